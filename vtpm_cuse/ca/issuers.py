"""Issuers from what the user names: a certificate file, and a key: see `own_key`, or pkcs11: URI."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from vtpm_cuse.ca.certificates import Issuer
from vtpm_cuse.ca.keyfiles import is_key_file
from vtpm_cuse.ca.keys import PrivateKey, is_hashless, refusals, verify
from vtpm_cuse.ca.tpmkeys import KeyTpm, TpmKey, is_handle
from vtpm_cuse.errors import CertificateError
from vtpm_cuse.files import read_small

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vtpm_cuse.ca.certificates import Signer
    from vtpm_cuse.ca.keys import HashlessPublicKey

    _IssuerKey = rsa.RSAPublicKey | ec.EllipticCurvePublicKey | HashlessPublicKey

_ANY_TPM: Final = KeyTpm()


def open_issuer(
    certificate_path: str,
    key: str,
    password: bytes | None = None,
    pin: bytes | None = None,
    environment: Mapping[str, str] | None = None,
    tpm: KeyTpm = _ANY_TPM,
    *,
    streams: bool = False,
) -> Issuer:
    """The issuer whose certificate is in a PEM file; a signature proves that the key is its.

    Args:
        certificate_path: The first certificate in the file counts.
        key: Path of a PEM file, handle:NUMBER in a TPM, or a pkcs11: URI.
        password: Of the key.
        pin: Of the token.
        environment: Variables that the token's library needs.
        tpm: See `own_key`.
        streams: The files may be pipes.

    Raises:
        CertificateError: One of them cannot be read, or they do not belong together.
    """
    place = f"Could not read certificate from file {certificate_path} "
    pem = _read(certificate_path, place, streams=streams)
    try:
        with refusals():
            name, key_id, public = _contents(x509.load_pem_x509_certificate(pem), certificate_path)
    except ValueError as exc:
        raise CertificateError(
            f"Could not import issuer certificate {certificate_path}", str(exc)
        ) from exc
    signer = _signer(key, password, pin, environment or {}, tpm, streams=streams)
    _prove(public, signer, certificate_path, key)
    return Issuer(name, key_id, signer)


def pem_certificate(certificate: bytes) -> bytes:
    """PEM of a certificate in DER."""
    return x509.load_der_x509_certificate(certificate).public_bytes(serialization.Encoding.PEM)


def origin_of_untrusted(certificate: bytes) -> tuple[bytes, bytes]:
    """Whose a certificate in DER is: the identifier of its issuer's key, and its serial number.

    Raises:
        CertificateError: It is none, or does not say.
    """
    try:
        with refusals():
            loaded = x509.load_der_x509_certificate(certificate)
            found = loaded.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
            number = loaded.serial_number
            serial = number.to_bytes((number.bit_length() + 7) // 8 or 1, "big")
    except ValueError as exc:
        raise CertificateError("The endorsement key's certificate", str(exc)) from exc
    if found.key_identifier is None:
        raise CertificateError("The endorsement key's certificate", "it names no key of its issuer")
    return found.key_identifier, serial


def _contents(certificate: x509.Certificate, path: str) -> tuple[bytes, bytes, _IssuerKey]:
    """Name, key identifier and key; the library looks into them only now."""
    public = certificate.public_key()
    try:
        key_id = certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    except x509.ExtensionNotFound:  # one made by hand; RFC 5280, 4.2.1.2, has it of the key then
        key_id = x509.SubjectKeyIdentifier.from_public_key(public)
    if isinstance(public, rsa.RSAPublicKey | ec.EllipticCurvePublicKey) or is_hashless(public):
        return certificate.subject.public_bytes(), key_id.digest, public
    raise CertificateError(path, "its key is no RSA, elliptic curve, EdDSA or ML-DSA key")


def own_key(
    key: str, password: bytes | None = None, tpm: KeyTpm = _ANY_TPM, *, streams: bool = False
) -> PrivateKey | TpmKey:
    """A key whose public half is known: that of a file, or a persistent one of a TPM.

    Args:
        key: Path of a PEM file, of a key as such or of one for a TPM; or handle:NUMBER.
        password: Of the key.
        tpm: Where a key of a TPM is; where it is named, no other key will do.
        streams: The file may be a pipe.

    Raises:
        CertificateError: There is no such key.
    """
    if is_handle(key):
        return TpmKey.at(key, password, tpm)
    pem = _read(key, f"Could not read signing key from file {key}", streams=streams)
    if is_key_file(pem):
        return TpmKey.from_pem(key, pem, password, tpm)
    if tpm.named:
        raise CertificateError(key, f"it is no key of a TPM, as of the one at {tpm.where}")
    try:
        return PrivateKey.from_pem(pem, password)
    except ValueError as exc:
        raise CertificateError(f"Could not import signing key {key}", str(exc)) from exc


def _signer(
    key: str,
    password: bytes | None,
    pin: bytes | None,
    environment: Mapping[str, str],
    tpm: KeyTpm,
    *,
    streams: bool,
) -> Signer:
    if key.startswith("tpmkey:"):
        reason = "GnuTLS's TPM keys are not supported; use a key file of the TPM's"
        raise CertificateError(f"Could not import tpmkey {key}", reason)
    if key.startswith("pkcs11:"):
        if tpm.named:
            raise CertificateError(key, f"its token finds its TPM itself, not at {tpm.where}")
        from vtpm_cuse.ca.pkcs11 import TokenKey

        return TokenKey(key, pin, environment)
    return own_key(key, password, tpm, streams=streams)


def _prove(public: _IssuerKey, signer: Signer, path: str, key: str) -> None:
    data, digest = os.urandom(32), signer.digest("sha256")
    signature = signer.sign(data, digest)
    try:
        verify(public, signature, data, digest)
    except ValueError:  # for InvalidSignature, and keys that fit nothing
        raise CertificateError(
            f"{key} and {path}", "the key is not that of the certificate"
        ) from None


def _read(path: str, place: str, *, streams: bool) -> bytes:
    try:
        return read_small(path, streams=streams)
    except (OSError, ValueError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else str(exc)
        raise CertificateError(place, f"Error while reading file. {reason}") from exc
