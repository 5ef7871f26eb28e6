"""What a CA signs with, by the kind of its key, and keys that are no more than their bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import (
    ec,
    ed448,
    ed25519,
    mldsa,
    mlkem,
    rsa,
    x25519,
)

from tests.support.certificates import der_of, verify
from tests.support.setups import succeed
from vtpm_cuse.ca.certificates import (
    CertificateKind,
    CertificateRequest,
    Issuer,
    Maker,
    TpmSpecification,
    Validity,
    ca_certificate,
    tpm_certificate,
)
from vtpm_cuse.ca.issuers import open_issuer, pem_certificate
from vtpm_cuse.ca.keys import RAW_KINDS, PrivateKey, PublicKey
from vtpm_cuse.ca.localca import _now
from vtpm_cuse.ca.names import common_name
from vtpm_cuse.errors import CertificateError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes, PublicKeyTypes

MAKERS: dict[str, Callable[[], PrivateKeyTypes]] = {
    "rsa2048": lambda: rsa.generate_private_key(65537, 2048),
    "rsa2304": lambda: rsa.generate_private_key(65537, 2304),
    "secp256r1": lambda: ec.generate_private_key(ec.SECP256R1()),
    "secp384r1": lambda: ec.generate_private_key(ec.SECP384R1()),
    "secp521r1": lambda: ec.generate_private_key(ec.SECP521R1()),
    "ed25519": ed25519.Ed25519PrivateKey.generate,
    "ed448": ed448.Ed448PrivateKey.generate,
    "ml-dsa-44": mldsa.MLDSA44PrivateKey.generate,
    "ml-dsa-87": mldsa.MLDSA87PrivateKey.generate,
}
WITH_SHA2 = {"rsa2048": 256, "rsa2304": 384, "secp256r1": 256, "secp384r1": 384, "secp521r1": 512}
OPENSSL = ("openssl", "verify", "-ignore_critical")
OPENSSL_3 = {*WITH_SHA2, "ed25519", "ed448"}  # what every version knows

TPM = Maker("id:00001014", "swtpm", "id:20240125")
SPEC = TpmSpecification("2.0", 0, 183)
EK = ec.generate_private_key(ec.SECP256R1()).public_key().public_numbers()


def pem_of(key: PrivateKeyTypes) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def ca_of(key: PrivateKeyTypes, folder: Path) -> Issuer:
    """One that signs itself, opened from its files."""
    (folder / "key.pem").write_bytes(pem_of(key))
    own = PrivateKey.from_pem(pem_of(key), None)
    subject = common_name("a CA")
    issuer = Issuer(subject, own.public.key_id, own)
    made = ca_certificate(subject, own.public, issuer, 1, Validity(_now()))
    (folder / "ca.pem").write_bytes(pem_certificate(made))
    return open_issuer(str(folder / "ca.pem"), str(folder / "key.pem"))


def ek_certificate(issuer: Issuer, *, is_tpm2: bool = True) -> bytes:
    key = PublicKey.from_point("secp256r1", EK.x, EK.y)
    request = CertificateRequest(CertificateKind.EK, key, TPM, SPEC, is_tpm2=is_tpm2)
    return tpm_certificate(request, issuer, 7, Validity(_now()))


@pytest.mark.parametrize("kind", MAKERS)
def test_a_certificate_by_each_kind_of_key(kind: str, tmp_path: Path) -> None:
    """The hash goes with the key's size; EdDSA and ML-DSA have none, and sign for no TPM 1.2."""
    issuer = ca_of(MAKERS[kind](), tmp_path)
    made = ek_certificate(issuer)
    verify(made, der_of(tmp_path / "ca.pem"))
    found = x509.load_der_x509_certificate(made).signature_hash_algorithm
    assert (found and found.name) == (f"sha{WITH_SHA2[kind]}" if kind in WITH_SHA2 else None)
    if kind in WITH_SHA2:
        verify(ek_certificate(issuer, is_tpm2=False), der_of(tmp_path / "ca.pem"))
    else:
        with pytest.raises(CertificateError, match="hashless signing scheme for TPM 1"):
            ek_certificate(issuer, is_tpm2=False)
    if kind in OPENSSL_3 or "ML-DSA-44" in succeed("openssl", "list", "-signature-algorithms"):
        (tmp_path / "ek.pem").write_bytes(pem_certificate(made))
        succeed(*OPENSSL, "-CAfile", tmp_path / "ca.pem", tmp_path / "ek.pem")


@pytest.mark.parametrize("kind", ["ed25519", "ml-dsa-44", "secp384r1"])
def test_another_key_of_the_same_kind_is_not_the_cas(kind: str, tmp_path: Path) -> None:
    ca_of(MAKERS[kind](), tmp_path)
    (tmp_path / "key.pem").write_bytes(pem_of(MAKERS[kind]()))
    with pytest.raises(CertificateError, match="the key is not that of the certificate"):
        open_issuer(str(tmp_path / "ca.pem"), str(tmp_path / "key.pem"))


@pytest.mark.parametrize(
    "key", [x25519.X25519PrivateKey.generate(), mlkem.MLKEM768PrivateKey.generate()]
)
def test_a_key_that_cannot_sign(key: PrivateKeyTypes) -> None:
    with pytest.raises(ValueError, match="no RSA, elliptic curve, EdDSA or ML-DSA key"):
        PrivateKey.from_pem(pem_of(key), None)


RAW = {
    "ml-kem-768": mlkem.MLKEM768PrivateKey.generate().public_key(),
    "ml-kem-1024": mlkem.MLKEM1024PrivateKey.generate().public_key(),
    "ml-dsa-44": mldsa.MLDSA44PrivateKey.generate().public_key(),
    "ml-dsa-65": mldsa.MLDSA65PrivateKey.generate().public_key(),
    "ml-dsa-87": mldsa.MLDSA87PrivateKey.generate().public_key(),
}


def raw_of(public: PublicKeyTypes) -> bytes:
    return public.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)


@pytest.mark.parametrize("kind", RAW)
def test_a_key_by_its_bytes_is_that_of_a_pem_file(kind: str) -> None:
    public = cast("PublicKeyTypes", RAW[kind])
    pem = public.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    made = PublicKey.from_raw(kind, raw_of(public))
    assert made == PublicKey.from_pem(pem)
    assert not made.agrees


@pytest.mark.parametrize("kind", RAW_KINDS)
def test_a_key_of_another_size_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=f"a key for {kind} has [0-9]+ bytes, and not 1000"):
        PublicKey.from_raw(kind, bytes(1000))


def test_ml_kem_512_which_the_library_does_not_know() -> None:
    """By its neighbour: another identifier, another size."""
    larger = raw_of(cast("PublicKeyTypes", RAW["ml-kem-768"]))
    small, usual = (
        PublicKey.from_raw(f"ml-kem-{size}", larger[:octets]).spki
        for size, octets in ((512, 800), (768, 1184))
    )
    assert small.endswith(larger[:800])
    assert small[4:16] == usual[4:16]  # up to the last number of the identifier
    assert (small[16], usual[16]) == (1, 2)
