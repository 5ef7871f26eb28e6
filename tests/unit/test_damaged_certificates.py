"""Certificates and keys that are damaged, or of a kind that nobody knows: one line, always."""

from __future__ import annotations

import base64
import random
import ssl
from typing import TYPE_CHECKING, Final

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from tests.support.certificates import der_of, make_ca
from vtpm_cuse.ca.issuers import open_issuer
from vtpm_cuse.ca.keys import PrivateKey, PublicKey
from vtpm_cuse.errors import CertificateError

if TYPE_CHECKING:
    from pathlib import Path

MUTATIONS: Final = 1000
RSA_KIND = bytes.fromhex("06092a864886f70d010101")
ML_DSA = bytes.fromhex("06092a864886f70d01017f")  # as long, and nobody's


def opened(folder: Path, certificate: bytes, key: Path) -> str:
    """What is said of an issuer; empty if it is taken."""
    path = folder / "cert.pem"
    path.write_text(ssl.DER_cert_to_PEM_cert(certificate))
    try:
        open_issuer(str(path), str(key))
    except CertificateError as exc:
        return str(exc)
    return ""


def mutated(data: bytes, chance: random.Random) -> bytes:
    """A copy with a few bytes turned, put in or taken out, lengths and tags among them."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        at = chance.randrange(len(changed))
        match chance.randrange(4):
            case 0:
                changed[at] ^= 1 << chance.randrange(8)
            case 1:
                changed[at] = chance.randrange(256)
            case 2:
                del changed[at : at + chance.randrange(1, 4)]
            case _:
                changed[at:at] = chance.randbytes(chance.randrange(1, 4))
    return bytes(changed)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (RSA_KIND, ML_DSA),  # a key of a kind that the library does not know
        (bytes.fromhex("a003020102"), bytes.fromhex("a003020104")),  # version 5
        (bytes.fromhex("0603550403"), bytes.fromhex("0603550480")),  # no identifier of a name
        (b"Test CA", b"\xff" * 7),  # no text
    ],
)
def test_an_issuer_that_is_damaged_inside_is_named(old: bytes, new: bytes, tmp_path: Path) -> None:
    ca = make_ca(tmp_path / "ca")
    der = der_of(ca.certificate)
    assert old in der
    said = opened(tmp_path, der.replace(old, new), ca.key)
    assert str(tmp_path / "cert.pem") in said
    assert "\n" not in said


@pytest.mark.parametrize("seed", range(2))
def test_no_mutated_issuer_is_more_than_one_line(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)  # noqa: S311
    ca = make_ca(tmp_path / "ca")
    der = der_of(ca.certificate)
    said = [opened(tmp_path, mutated(der, chance), ca.key) for _ in range(MUTATIONS // 4)]
    assert not [text for text in said if "\n" in text or len(text) > 600]
    assert len(set(said)) > 3  # they get as far as different places


@pytest.mark.parametrize("seed", range(2))
def test_no_mutated_key_is_anything_but_a_value_error(seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311
    encodings = [
        key.private_bytes(
            serialization.Encoding.DER,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        for key in (
            rsa.generate_private_key(65537, 2048),
            ec.generate_private_key(ec.SECP256R1()),
            ed25519.Ed25519PrivateKey.generate(),
        )
    ]
    public = ec.generate_private_key(ec.SECP384R1()).public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )  # fmt: skip
    refused = 0
    for _ in range(MUTATIONS // 4):
        private = pem("PRIVATE KEY", mutated(chance.choice(encodings), chance))
        for load, text in (
            (lambda text: PrivateKey.from_pem(text, None).sign(b"data", "sha256"), private),
            (PublicKey.from_pem, pem("PUBLIC KEY", mutated(public, chance))),
        ):
            try:
                load(text)
            except (ValueError, CertificateError):
                refused += 1
    assert refused > MUTATIONS // 8


def pem(label: str, der: bytes) -> bytes:
    text = base64.b64encode(der).decode()
    return f"-----BEGIN {label}-----\n{text}\n-----END {label}-----\n".encode()
