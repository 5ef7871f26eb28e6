"""Certificates byte for byte: those of the C suite made again from what they say."""

from __future__ import annotations

import hashlib
import ssl
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given
from hypothesis import strategies as st

from tests.support.certificates import CERTS, Parts, elements
from vtpm_cuse.ca import der
from vtpm_cuse.ca.certificates import (
    NEVER,
    CertificateKind,
    CertificateRequest,
    Issuer,
    Maker,
    TpmSpecification,
    Validity,
    bare_certificate,
    ca_certificate,
    stored_form,
    tpm_certificate,
)
from vtpm_cuse.ca.issuers import pem_certificate
from vtpm_cuse.ca.keys import PublicKey, signature_algorithm
from vtpm_cuse.ca.names import common_name

if TYPE_CHECKING:
    from collections.abc import Callable

TPM2 = Maker("id:00001014", "swtpm", "id:20240125")
SPEC2 = TpmSpecification("2.0", 0, 183)
MACHINE = Maker("Linux", "Linux", "#1_SMP_PREEMPT_DYNAMIC_@0")


class FixedSigner:
    """Signs with bytes given in advance, and keeps what it signed."""

    def __init__(self, signature: bytes) -> None:
        self.signature = signature
        self.signed: list[tuple[bytes, str]] = []

    def digest(self, usual: str) -> str:
        return usual

    def algorithm(self, digest: str) -> bytes:
        return signature_algorithm(digest, rsa_key=True)

    def sign(self, data: bytes, digest: str) -> bytes:
        self.signed.append((data, digest))
        return self.signature


def issuer_of(signer: FixedSigner, name: str = "issuercert.pem") -> Issuer:
    certificate = x509.load_pem_x509_certificate((CERTS / name).read_bytes())
    key_id = certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest
    return Issuer(certificate.subject.public_bytes(), key_id, signer)


def moment(text: bytes) -> datetime:
    return datetime.strptime(text.decode(), "%y%m%d%H%M%SZ").replace(tzinfo=UTC)


def signature_of(certificate: bytes) -> bytes:
    ((_, whole),) = elements(certificate)
    return list(elements(whole))[2][1][1:]


def key_of(certificate: bytes) -> PublicKey:
    public = x509.load_der_x509_certificate(certificate).public_key()
    if isinstance(public, ec.EllipticCurvePublicKey):
        numbers = public.public_numbers()
        return PublicKey.from_point("secp384r1", numbers.x, numbers.y)
    assert isinstance(public, rsa.RSAPublicKey)
    return PublicKey.from_rsa(public.public_numbers().n)


def ek2(key: PublicKey) -> CertificateRequest:
    return CertificateRequest(CertificateKind.EK, key, TPM2, SPEC2, subject="CN=unknown")


def platform2(key: PublicKey) -> CertificateRequest:
    return CertificateRequest(
        CertificateKind.PLATFORM, key, TPM2, platform=MACHINE, subject="CN=testvm"
    )


@pytest.mark.parametrize(
    ("file", "request_of"),
    [
        ("tpm2-ek-rsa2048.der", ek2),
        ("tpm2-ek-secp384r1.der", ek2),
        ("tpm2-platform.der", platform2),
    ],
)
def test_a_tpm2_certificate_of_the_c_suite_is_made_again(
    file: str, request_of: Callable[[PublicKey], CertificateRequest]
) -> None:
    theirs = (CERTS / file).read_bytes()
    parts = Parts.of(theirs)
    signer = FixedSigner(signature_of(theirs))
    ours = tpm_certificate(
        request_of(key_of(theirs)),
        issuer_of(signer),
        int.from_bytes(parts.serial, "big"),
        Validity(moment(parts.start[1])),
    )
    assert ours == theirs
    assert [digest for _, digest in signer.signed] == ["sha256"]


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("tpm12-ek-with-tcg-header.bin", CertificateKind.EK),
        ("tpm12-platform-with-tcg-header.bin", CertificateKind.PLATFORM),
    ],
)
def test_a_tpm12_certificate_of_the_c_suite_is_made_again(file: str, kind: CertificateKind) -> None:
    stored = (CERTS / file).read_bytes()
    theirs = stored[7:]
    parts = Parts.of(theirs)
    ((_, numbers),) = elements(list(elements(parts.key))[1][1][1:])
    modulus, exponent = (int.from_bytes(content, "big") for _, content in elements(numbers))
    request = CertificateRequest(
        kind,
        PublicKey.from_rsa(modulus, exponent),
        Maker("id:00001014", "swtpm", "id:00740001"),
        TpmSpecification("1.2", 2, 116) if kind is CertificateKind.EK else None,
        MACHINE,
        "CN=ignored",
        is_tpm2=False,
    )
    signer = FixedSigner(signature_of(theirs))
    validity = Validity(moment(parts.start[1]))
    ours = tpm_certificate(
        request, issuer_of(signer), int.from_bytes(parts.serial, "big"), validity
    )
    assert ours == theirs
    assert stored_form(ours) == stored
    assert bare_certificate(stored) == ours
    assert [digest for _, digest in signer.signed] == ["sha1"]


def test_a_certificate_without_its_header() -> None:
    assert bare_certificate(bytes.fromhex("100100 0005 1002 308201")) == b"\x30\x82\x01"
    for other in (b"", b"\x30\x82\x01", bytes.fromhex("100100 0006 1002 308201")):
        assert bare_certificate(other) == other


@pytest.mark.parametrize("file", ["swtpm-localca-rootca-cert.pem", "issuercert.pem"])
def test_a_ca_certificate_of_the_c_suite_is_made_again(file: str) -> None:
    pem = (CERTS / file).read_text()
    theirs = ssl.PEM_cert_to_DER_cert(pem)
    parts = Parts.of(theirs)
    signer = FixedSigner(signature_of(theirs))
    name = "swtpm-localca-rootca" if "root" in file else "swtpm-localca"
    ours = ca_certificate(
        common_name(name),
        key_of(theirs),
        issuer_of(signer, "swtpm-localca-rootca-cert.pem"),
        int.from_bytes(parts.serial, "big"),
        Validity(moment(parts.start[1])),
    )
    assert ours == theirs
    assert pem_certificate(ours).decode() == pem


def test_an_aik_certificate() -> None:
    """The C suite makes none; the fields are those of an EK but for the purpose and the use."""
    key = key_of((CERTS / "tpm2-ek-rsa2048.der").read_bytes())
    request = CertificateRequest(CertificateKind.AIK, key, TPM2, SPEC2, subject="CN=aik")
    made = tpm_certificate(request, issuer_of(FixedSigner(b"s")), 1, Validity(NEVER))
    own, ek = Parts.of(made), Parts.of((CERTS / "tpm2-ek-rsa2048.der").read_bytes())
    assert own.extensions[1:-1] == ek.extensions[1:-1]
    loaded = x509.load_der_x509_certificate(made)
    purpose = loaded.extensions.get_extension_for_class(x509.ExtendedKeyUsage)
    assert [oid.dotted_string for oid in purpose.value] == ["2.23.133.8.3"]
    assert not purpose.critical
    usage = loaded.extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical
    assert usage.value.digital_signature
    assert not usage.value.key_encipherment


@given(st.integers(1, (1 << 160) - 1) | st.sampled_from([127, 128, 255, 256, 32768, 33023]))
def test_no_serial_number_is_negative(serial: int) -> None:
    """The C suite makes 128, 32768 and 33023 negative."""
    key = PublicKey.from_rsa(1 << 2047 | 1)
    made = tpm_certificate(ek2(key), issuer_of(FixedSigner(b"s")), serial, Validity(NEVER))
    content = Parts.of(made).serial
    assert int.from_bytes(content, "big", signed=True) == serial
    assert content[0] or content[1] & 0x80 or len(content) == 1  # no octet too much


@given(st.text(max_size=60), st.text(max_size=60), st.text(max_size=60))
def test_odd_names_of_makers_come_out_as_they_went_in(first: str, second: str, third: str) -> None:
    request = CertificateRequest(
        CertificateKind.EK, PublicKey.from_rsa(77), Maker(first, second, third), SPEC2
    )
    made = tpm_certificate(request, issuer_of(FixedSigner(b"s")), 1, Validity(NEVER))
    extension = Parts.of(made).extensions[1]
    *_, (_, value) = elements(extension)
    ((_, names),) = elements(value)
    ((tag, name),) = elements(names)
    assert tag == 0xA4
    ((_, rows),) = elements(name)
    found = []
    for _, row in elements(rows):
        ((_, pair),) = elements(row)
        _, (string_tag, text) = elements(pair)
        assert string_tag == 0x0C
        found.append(text.decode())
    assert found == [first, second, third]


def test_requests_that_can_be_no_certificate() -> None:
    key = PublicKey.from_rsa(77)
    with pytest.raises(ValueError, match="specification"):
        CertificateRequest(CertificateKind.EK, key, TPM2)
    with pytest.raises(ValueError, match="platform"):
        CertificateRequest(CertificateKind.PLATFORM, key, TPM2)
    with pytest.raises(ValueError, match="no value in 'CN='"):
        CertificateRequest(CertificateKind.EK, key, TPM2, SPEC2, subject="CN=")
    with pytest.raises(ValueError, match="surrogates"):
        CertificateRequest(CertificateKind.EK, key, Maker("\udcff", "", ""), SPEC2)
    with pytest.raises(ValueError, match="no point of secp256r1"):
        PublicKey.from_point("secp256r1", 1, 1)
    with pytest.raises(ValueError, match="unknown curve"):
        PublicKey.from_point("secp192r1", 1, 1)


def test_the_key_identifier_is_that_of_gnutls() -> None:
    """It is in the vectors: SHA-1 of all of SubjectPublicKeyInfo."""
    certificate = x509.load_pem_x509_certificate((CERTS / "issuercert.pem").read_bytes())
    spki = certificate.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    found = certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest
    assert found == hashlib.sha1(spki).digest() == PublicKey(spki).key_id  # noqa: S324


# -- validity and DER -------------------------------------------------------------------------


def test_days() -> None:
    start = datetime(2026, 11, 21, 5, 0, 0, tzinfo=UTC)
    assert Validity.of_days(start, 1).end == datetime(2026, 11, 22, 5, 0, 0, tzinfo=UTC)
    assert Validity.of_days(start, 0).end == start
    for days in (-1, -7, 10_000_000, 1 << 31):
        assert Validity.of_days(start, days).end == NEVER


@pytest.mark.parametrize(
    ("year", "tag", "text"),
    [
        (1950, 0x17, b"500203040506Z"),
        (2049, 0x17, b"490203040506Z"),
        (2050, 0x18, b"20500203040506Z"),
        (9999, 0x18, b"99990203040506Z"),
    ],
)
def test_forms_of_time(year: int, tag: int, text: bytes) -> None:
    ((found, content),) = elements(der.time(datetime(year, 2, 3, 4, 5, 6, tzinfo=UTC)))
    assert (found, content) == (tag, text)


@pytest.mark.parametrize(
    ("bits", "encoded"),
    [((0,), "03020780"), ((2,), "03020520"), ((4,), "03020308"), ((5,), "03020204"),
     ((0, 2), "030205a0"), ((8,), "0303070080")],
)  # fmt: skip
def test_named_bits(bits: tuple[int, ...], encoded: str) -> None:
    assert der.named_bits(*bits).hex() == encoded


@given(st.integers(0, 1 << 70))
def test_integers(number: int) -> None:
    ((_, content),) = elements(der.integer(number))
    assert int.from_bytes(content, "big", signed=True) == number
    assert len(content) == 1 or content[0] or content[1] & 0x80


def test_negative_integers_are_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        der.integer(-1)


@given(st.binary(max_size=70000))
def test_lengths(body: bytes) -> None:
    assert list(elements(der.octet_string(body))) == [(4, body)]


@given(st.lists(st.integers(0, 1 << 40), min_size=1, max_size=6))
def test_object_identifiers(rest: list[int]) -> None:
    dotted = ".".join(map(str, [2, 23, *rest]))
    ((_, content),) = elements(der.oid(dotted))
    numbers, value = [], 0
    for octet in content:
        value = value << 7 | octet & 0x7F
        if not octet & 0x80:
            numbers.append(value)
            value = 0
    assert numbers == [2 * 40 + 23, *rest]
