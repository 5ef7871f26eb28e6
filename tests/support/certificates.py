"""Certificates as the tests see them: cut up without the package's own encoder."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.x509.oid import NameOID

if TYPE_CHECKING:
    from collections.abc import Iterator

CERTS: Final = Path(__file__).parents[1] / "vectors" / "certs"

_CURVES: Final[dict[str, ec.EllipticCurve]] = {"p256": ec.SECP256R1(), "p384": ec.SECP384R1()}
_WITH_SHA1: Final = {"2a864886f70d010105", "2a8648ce3d0401"}


def elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Tag and content of the DER elements that *data* consists of."""
    at = 0
    while at < len(data):
        tag, size, head = data[at], data[at + 1], 2
        if size & 0x80:
            head = 2 + (size & 0x7F)
            size = int.from_bytes(data[at + 2 : at + head], "big")
        assert at + head + size <= len(data)
        yield tag, data[at + head : at + head + size]
        at += head + size


@dataclass(frozen=True)
class Parts:
    """The fields of a certificate; two certificates are alike if these are equal."""

    version: bytes
    serial: bytes
    algorithm: bytes
    issuer: bytes
    start: tuple[int, bytes]
    end: tuple[int, bytes]
    subject: bytes
    key: bytes
    extensions: tuple[bytes, ...]
    outer_algorithm: bytes
    signature_size: int

    @property
    def forms_of_time(self) -> tuple[int, int]:
        return self.start[0], self.end[0]

    @property
    def moments(self) -> tuple[datetime, datetime]:
        start, end = (
            datetime.strptime(
                text.decode(), "%y%m%d%H%M%SZ" if tag == 0x17 else "%Y%m%d%H%M%SZ"
            ).replace(tzinfo=UTC)
            for tag, text in (self.start, self.end)
        )
        return start, end

    @property
    def duration(self) -> object:
        """Days, or the end that all certificates for ever have."""
        start, end = self.moments
        return end if end.year == 9999 else end - start

    @classmethod
    def of(cls, certificate: bytes) -> Parts:
        ((_, whole),) = elements(certificate)
        (_, body), (_, outer), (_, signature) = elements(whole)
        version, serial, algorithm, issuer, validity, subject, key, tail = elements(body)
        start, end = elements(validity[1])
        ((_, rows),) = elements(tail[1])
        return cls(
            version[1],
            serial[1],
            algorithm[1],
            issuer[1],
            start,
            end,
            subject[1],
            key[1],
            tuple(row for _, row in elements(rows)),
            outer,
            len(signature) // 8,  # that of an ECDSA signature varies
        )


def der_of(path: Path) -> bytes:
    """The first certificate in a PEM file."""
    certificate = x509.load_pem_x509_certificate(path.read_bytes())
    return certificate.public_bytes(serialization.Encoding.DER)


@dataclass(frozen=True)
class TestCa:
    """A key and its certificate in files."""

    __test__ = False

    key: Path
    certificate: Path

    @property
    def words(self) -> list[str]:
        return ["--signkey", str(self.key), "--issuercert", str(self.certificate)]


def make_ca(folder: Path, kind: str = "rsa", password: bytes | None = None) -> TestCa:
    """A CA made without the package; its name has several parts, and of every string type."""
    folder.mkdir(exist_ok=True)
    key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey
    if kind == "rsa":
        key = rsa.generate_private_key(65537, 2048)
    else:
        key = ec.generate_private_key(_CURVES[kind])
    ca = TestCa(folder / "ca.key", folder / "ca.pem")
    encryption = (
        serialization.BestAvailableEncryption(password)
        if password
        else serialization.NoEncryption()
    )
    ca.key.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    )
    name = "/C=DE/O=Über/emailAddress=ca@example.org/CN=Test CA"
    words = ["openssl", "req", "-x509", "-new", "-utf8", "-key", str(ca.key), "-days", "3650"]
    if password:
        words += ["-passin", "env:CA_PASSWORD"]
    words += ["-subj", name, "-out", str(ca.certificate)]
    env = {"CA_PASSWORD": (password or b"").decode(), "PATH": "/usr/bin:/bin"}
    subprocess.run(words, check=True, capture_output=True, env=env)
    loaded = x509.load_pem_x509_certificate(ca.certificate.read_bytes())
    assert loaded.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value == "Test CA"
    return ca


def verify(certificate: bytes, ca: bytes) -> None:
    """A signature check by the library, of two certificates in DER; another raises."""
    issuer = x509.load_der_x509_certificate(ca)
    parts = Parts.of(certificate)
    if next(elements(parts.algorithm))[1].hex() not in _WITH_SHA1:
        x509.load_der_x509_certificate(certificate).verify_directly_issued_by(issuer)
        return
    ((_, whole),) = elements(certificate)
    (_, body), _, (_, signature) = elements(whole)
    signed = whole[: whole.index(body) + len(body)]
    public, chosen = issuer.public_key(), hashes.SHA1()  # noqa: S303
    if isinstance(public, rsa.RSAPublicKey):
        public.verify(signature[1:], signed, padding.PKCS1v15(), chosen)
    else:
        assert isinstance(public, ec.EllipticCurvePublicKey)
        public.verify(signature[1:], signed, ec.ECDSA(chosen))
