"""The keys in certificates, and the private keys that sign them, with `cryptography`."""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa

from vtpm_cuse.ca import der
from vtpm_cuse.errors import CertificateError, VtpmError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Self

CURVES: Final[dict[str, type[ec.EllipticCurve]]] = {
    "secp256r1": ec.SECP256R1,
    "secp384r1": ec.SECP384R1,
    "secp521r1": ec.SECP521R1,
}

_SAID_MAX: Final = 160  # of an error; OpenSSL's can be lists
_RSA_ENCRYPTION: Final = "1.2.840.113549.1.1.1"
_HASHES: Final = {"sha1": hashes.SHA1, "sha256": hashes.SHA256}
_WITH_RSA: Final = {"sha1": "1.2.840.113549.1.1.5", "sha256": "1.2.840.113549.1.1.11"}
_WITH_ECDSA: Final = {"sha1": "1.2.840.10045.4.1", "sha256": "1.2.840.10045.4.3.2"}


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Whatever `cryptography` raises for keys and certificates it does not like: ValueError.

    It has no list of that: kinds it does not know and damage have classes of their own here and
    there, some of them no ValueError, and some come late, with the first use.
    """
    try:
        yield
    except VtpmError:
        raise
    except Exception as exc:
        said = " ".join(str(exc).split())
        raise ValueError(said[:_SAID_MAX] or type(exc).__name__) from exc


@dataclass(frozen=True, slots=True)
class PublicKey:
    """The key that a certificate is for.

    Attributes:
        spki: SubjectPublicKeyInfo in DER.
        agrees: It is for key agreement, where another one is for key encipherment.
    """

    spki: bytes
    agrees: bool = False

    @classmethod
    def from_rsa(cls, modulus: int, exponent: int = 65537) -> Self:
        """RSA. Raises ValueError if that can be no key."""
        if modulus < 3 or not 1 <= exponent < 1 << 64:
            raise ValueError("an RSA key needs a modulus and an exponent above zero")
        key = der.sequence(der.integer(modulus), der.integer(exponent))
        algorithm = der.sequence(der.oid(_RSA_ENCRYPTION), der.NULL)
        return cls(der.sequence(algorithm, der.bit_string(key)))

    @classmethod
    def from_point(cls, curve: str, x: int, y: int) -> Self:
        """The point of a curve of `CURVES`. Raises ValueError if it is not on it."""
        if curve not in CURVES:
            raise ValueError(f"unknown curve '{curve}'")
        numbers = ec.EllipticCurvePublicNumbers(x, y, CURVES[curve]())
        try:
            return cls(_spki(numbers.public_key()), agrees=True)
        except (ValueError, OverflowError):
            raise ValueError(f"x and y are no point of {curve}") from None

    @classmethod
    def from_pem(cls, pem: bytes) -> Self:
        """Of any kind. Raises ValueError.

        Such a key counts as one for encipherment even if it is on a curve, as in the C suite.
        """
        with refusals():
            key = serialization.load_pem_public_key(pem)
            return cls(
                key.public_bytes(
                    serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
                )
            )

    @property
    def key_id(self) -> bytes:
        """As GnuTLS makes it: SHA-1 over all of `spki`, 20 bytes."""
        return hashlib.sha1(self.spki, usedforsecurity=False).digest()


def _spki(key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey) -> bytes:
    return key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )


class PrivateKey:
    """An RSA or ECDSA key in memory: a `Signer` of `ca.certificates`."""

    def __init__(self, key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> None:
        self._key = key

    @classmethod
    def generate(cls, bits: int) -> Self:
        """A new RSA key."""
        return cls(rsa.generate_private_key(65537, bits))

    @classmethod
    def from_pem(cls, pem: bytes, passphrase: bytes | None) -> Self:
        """Reads a key, encrypted or not; a passphrase that is not needed is ignored.

        Raises:
            ValueError: It is no RSA or elliptic curve key, or the passphrase does not fit.
        """
        with refusals():
            key = _load_pem(pem, passphrase or None)
        if not isinstance(key, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey):
            raise ValueError("it is neither an RSA nor an elliptic curve key")
        return cls(key)

    def to_pem(self, passphrase: bytes | None) -> bytes:
        """PKCS #8, encrypted if there is a passphrase. Raises ValueError if that is too long."""
        encryption = (
            serialization.BestAvailableEncryption(passphrase)
            if passphrase
            else serialization.NoEncryption()
        )
        with refusals():
            return self._key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
            )

    @property
    def public(self) -> PublicKey:
        """Its public half."""
        return PublicKey(_spki(self._key.public_key()))

    def algorithm(self, digest: str) -> bytes:
        """AlgorithmIdentifier of its signatures."""
        return signature_algorithm(digest, rsa_key=isinstance(self._key, rsa.RSAPrivateKey))

    def sign(self, data: bytes, digest: str) -> bytes:
        """PKCS #1 v1.5, or ECDSA as DER. Raises CertificateError."""
        chosen = _HASHES[digest]()
        try:
            with refusals():
                if isinstance(self._key, rsa.RSAPrivateKey):
                    return self._key.sign(data, padding.PKCS1v15(), chosen)
                return self._key.sign(data, ec.ECDSA(chosen))
        except ValueError as exc:
            # Systems may forbid SHA-1, which the certificates of a TPM 1.2 are signed with.
            raise CertificateError("signing key", f"cannot sign with {digest}: {exc}") from exc


def signature_algorithm(digest: str, *, rsa_key: bool) -> bytes:
    """AlgorithmIdentifier of a signature over "sha1" or "sha256"."""
    if rsa_key:
        return der.sequence(der.oid(_WITH_RSA[digest]), der.NULL)
    return der.sequence(der.oid(_WITH_ECDSA[digest]))


def _load_pem(pem: bytes, secret: bytes | None) -> object:
    try:
        return serialization.load_pem_private_key(pem, secret)
    except TypeError as exc:
        if secret is None:
            raise ValueError("it is encrypted, and there is no password for it") from exc
        return serialization.load_pem_private_key(pem, None)
