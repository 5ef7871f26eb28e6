"""A TPM with keys of every kind, as a relying party sees it.

What is checked of identity keys is what TCG's "TPM 2.0 Keys for Device Identity and Attestation"
has one check: the chain, the TPM's serial number, the public area, a signature.
"""

from __future__ import annotations

import hashlib
import subprocess
from typing import TYPE_CHECKING, NamedTuple

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa

from tests.support.certificates import Parts, elements
from tests.support.setups import OURS, Workshop, make_workshop, served, succeed, tool
from vtpm_cuse.ca import der
from vtpm_cuse.manufacture.plan import KeyAlgorithm
from vtpm_cuse.manufacture.templates import ek_template
from vtpm_cuse.wire import tpm2
from vtpm_cuse.wire.tpm import TpmCc

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

WORDS = (
    *("--tpm2", "--create-ek-cert", "--create-platform-cert", "--lock-nvram", "--vmid", "vm1"),
    *("--ek1keyalgo", "secp256r1", "--ek2keyalgo", "ecc_nist_p521"),
    *("--iakkeyalgo", "secp384r1", "--idevidkeyalgo", "RSA2048"),
)
PLACES = {
    "ek-secp256r1": (0x8101000A, 0x1C0000A),
    "ek-secp521r1": (0x81010018, 0x1C00018),
    "iak-secp384r1": (0x81020001, 0x1C90100),
    "idevid-rsa2048": (0x81020000, 0x1C90200),
}
PLATFORM = 0x1C08000
LINES = """\
Successfully created secp256r1 EK with handle 0x8101000a.
Successfully created NVRAM area 0x1c0000a for secp256r1 EK certificate.
Successfully created NVRAM area 0x1c08000 for platform certificate.
Successfully created secp521r1 EK with handle 0x81010018.
Successfully created NVRAM area 0x1c00018 for secp521r1 EK certificate.
Successfully created secp384r1 IAK primary key with handle 0x81020001.
Successfully created NVRAM area 0x1c90100 for IAK certificate.
Successfully created RSA 2048 IDevID primary key with handle 0x81020000.
Successfully created NVRAM area 0x1c90200 for IDevID certificate.
""".splitlines()


class Made(NamedTuple):
    """A TPM that is served, and what its set-up left."""

    workshop: Workshop
    files: Path
    said: str
    tcti: str

    def certificate(self, name: str) -> x509.Certificate:
        """As the TPM has it."""
        stored = tool(self.tcti, "tpm2_nvread", "-C", "o", hex(PLACES[name][1]))
        return x509.load_der_x509_certificate(stored)

    def public(self, name: str) -> tpm2.Public:
        """The public area of a persistent key."""
        path = self.workshop.path / "public"
        handle = hex(PLACES[name][0])
        tool(self.tcti, "tpm2_readpublic", "-c", handle, "-f", "tss", "-o", path)
        return tpm2.read_public_untrusted(path.read_bytes()[2:])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    workshop = make_workshop(tmp_path_factory.mktemp("identity"))
    state, files = workshop.new_state("state"), workshop.new_state("files")
    run = workshop.run(OURS, "--tpm-state", state, "--write-ek-cert-files", files, *WORDS)
    assert run.returncode == 0, run.stdout + run.stderr
    with served(state) as tcti:
        yield Made(workshop, files, run.stdout, tcti)


def test_everything_is_where_the_log_says(made: Made) -> None:
    lines = made.said.splitlines()
    assert [line for line in lines if line.startswith("Successfully created")] == LINES
    for kind in ("EK", "iak", "idevid"):
        assert f"swtpm_localca: Successfully created {kind} certificate locally." in lines
    handles = tool(made.tcti, "tpm2_getcap", "handles-persistent").decode().split()
    assert {hex(handle) for handle, _ in PLACES.values()} == {h.lower() for h in handles} - {"-"}
    indexes = tool(made.tcti, "tpm2_nvreadpublic").decode().split()
    for index in (PLATFORM, *(index for _, index in PLACES.values())):
        assert f"{index:#x}:" in indexes
    assert {path.name for path in made.files.iterdir()} == {f"{name}.crt" for name in PLACES}
    for name in PLACES:
        der_form = made.certificate(name).public_bytes(serialization.Encoding.DER)
        assert der_form == (made.files / f"{name}.crt").read_bytes()


@pytest.mark.parametrize("name", PLACES)
def test_a_certificate_is_for_the_tpms_key_and_leads_to_the_root(name: str, made: Made) -> None:
    certificate = made.certificate(name)
    public, key = made.public(name), certificate.public_key()
    if isinstance(public, tpm2.RsaPublic):
        assert isinstance(key, rsa.RSAPublicKey)
        assert key.public_numbers().n == int.from_bytes(public.unique, "big")
    else:
        assert isinstance(key, ec.EllipticCurvePublicKey)
        numbers = key.public_numbers()
        assert (numbers.x, numbers.y) == tuple(
            int.from_bytes(part, "big") for part in (public.x, public.y)
        )
        assert numbers.curve.name in name
    path = made.workshop.path / f"{name}.pem"
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    root, issuer = (
        made.workshop.ca / file for file in ("swtpm-localca-rootca-cert.pem", "issuercert.pem")
    )
    # The critical SAN of an endorsement key's is none that openssl looks into.
    critical = ["-ignore_critical"] if name.startswith("ek") else []
    words = ["openssl", "verify", "-x509_strict", *critical, "-CAfile", str(root)]
    assert "OK" in succeed(*words, "-untrusted", issuer, path)


class Extension(NamedTuple):
    """By hand: `cryptography` reads no directory name with an attribute that is no string."""

    critical: bool
    value: bytes


def extensions_of(certificate: x509.Certificate) -> dict[str, Extension]:
    """By their identifiers."""
    found = {}
    for row in Parts.of(certificate.public_bytes(serialization.Encoding.DER)).extensions:
        (_, identifier), *flag, (_, value) = elements(row)
        found[IDENTIFIERS[identifier]] = Extension(flag == [(0x01, b"\xff")], value)
    return found


IDENTIFIERS = {
    der.oid(f"2.5.29.{number}")[2:]: name
    for number, name in ((15, "usage"), (17, "names"), (19, "constraints"), (35, "authority"))
}


@pytest.mark.parametrize("name", ["iak-secp384r1", "idevid-rsa2048"])
def test_the_certificate_of_an_identity_key(name: str, made: Made) -> None:
    certificate = made.certificate(name)
    assert certificate.subject.rfc4514_string() == "2.5.4.5=vm1"
    found = extensions_of(certificate)
    assert set(found) == set(IDENTIFIERS.values())
    assert found["usage"] == (True, bytes.fromhex("03020780"))  # digitalSignature
    assert found["constraints"] == (True, bytes.fromhex("3000"))  # no CA
    assert not found["names"].critical
    assert hardware_module_name(found["names"].value) == (
        der.oid("2.23.133.1.2")[2:],  # a TPM 2.0
        serial_of_the_tpm(made),
    )


def serial_of_the_tpm(made: Made) -> bytes:
    """Its maker, and who has signed the first endorsement key's certificate, with what number."""
    ek = made.certificate("ek-secp256r1")
    authority = ek.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
    assert authority.key_identifier
    number = f"{ek.serial_number:x}"
    number = "0" * (len(number) % 2) + number
    return f"IBM:{authority.key_identifier.hex()}:{number}".encode()


def hardware_module_name(names: bytes) -> tuple[bytes, bytes]:
    """Type and serial number, from the one attribute of the one directoryName."""
    ((_, one),) = elements(names)
    ((tag, name),) = elements(one)
    assert tag == 0xA4
    ((_, rows),) = elements(name)
    ((_, row),) = elements(rows)
    ((_, attribute),) = elements(row)
    (_, kind), (_, pair) = elements(attribute)
    assert kind == der.oid("1.3.6.1.5.5.7.8.4")[2:]
    (_, hardware), (string_tag, serial) = elements(pair)
    assert string_tag == 0x04
    return hardware, serial


def test_attributes_of_identity_keys(made: Made) -> None:
    """Made in this TPM, never to leave it; the one for attestation signs no forged quote."""
    attributes = tpm2.TpmaObject
    wanted = attributes.FIXED_TPM | attributes.FIXED_PARENT | attributes.SENSITIVE_DATA_ORIGIN
    wanted |= attributes.USER_WITH_AUTH | attributes.ADMIN_WITH_POLICY | attributes.SIGN
    iak, idevid = made.public("iak-secp384r1"), made.public("idevid-rsa2048")
    assert iak.objectAttributes == wanted | attributes.RESTRICTED
    assert idevid.objectAttributes == wanted
    assert len(iak.authPolicy) == hashlib.sha384().digest_size
    assert len(idevid.authPolicy) == hashlib.sha256().digest_size


def test_what_identity_keys_sign(made: Made) -> None:
    """A quote by the one, anything by the other: by the keys in the certificates."""
    path, tcti = made.workshop.path, made.tcti
    (path / "data").write_bytes(b"data")
    key = made.certificate("idevid-rsa2048").public_key()
    assert isinstance(key, rsa.RSAPublicKey)
    handle = ("-c", hex(PLACES["idevid-rsa2048"][0]))
    tool(
        *(tcti, "tpm2_sign", *handle, "-g", "sha256", "-s", "rsassa", "-f", "plain"),
        *("-o", path / "signature", path / "data"),
    )
    signature = (path / "signature").read_bytes()
    key.verify(signature, b"data", padding.PKCS1v15(), hashes.SHA256())
    handle = ("-c", hex(PLACES["iak-secp384r1"][0]))
    (path / "forged").write_bytes(b"\xffTCG\x80\x18")
    refused = subprocess.run(
        ["tpm2_sign", "-T", tcti, *handle, "-g", "sha384", "-o", path / "none", path / "forged"],
        check=False,
        capture_output=True,
    )
    assert refused.returncode != 0
    tool(
        *(tcti, "tpm2_quote", *handle, "-l", "sha256:0", "-q", "abcd", "-g", "sha384"),
        *("-m", path / "quoted", "-s", path / "signature", "-f", "plain"),
    )
    key = made.certificate("iak-secp384r1").public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    quoted = (path / "quoted").read_bytes()
    key.verify((path / "signature").read_bytes(), quoted, ec.ECDSA(hashes.SHA384()))
    assert quoted.startswith(b"\xffTCG\x80\x18")


@pytest.mark.parametrize(
    ("algorithm", "word"),
    [
        (KeyAlgorithm.RSA2048, "rsa2048"),
        (KeyAlgorithm.RSA3072, "rsa3072"),
        (KeyAlgorithm.P256, "ecc256"),
        (KeyAlgorithm.P384, "ecc384"),
        (KeyAlgorithm.P521, "ecc521"),
    ],
)
def test_an_endorsement_key_is_the_one_that_tpm2_tools_make(
    algorithm: KeyAlgorithm, word: str, made: Made
) -> None:
    path, tcti = made.workshop.path, made.tcti
    template = ek_template(algorithm)
    ours = tpm2.CreatePrimaryParameters(tpm2.SensitiveCreate().pack(), template.pack())
    code, session = TpmCc.TPM_CC_CreatePrimary, tpm2.PasswordSession()
    (path / "command").write_bytes(tpm2.command(code, (tpm2.TPM_RH_ENDORSEMENT,), ours, session))
    tool(tcti, "tpm2_send", path / "command", "-o", path / "response")
    response = tpm2.read_response_untrusted(code.name, (path / "response").read_bytes(), handles=1)
    public = tpm2.CreatePrimaryResult.unpack_untrusted(response.parameters).outPublic
    tool(tcti, "tpm2_flushcontext", "-t")
    tool(tcti, "tpm2_createek", "-G", word, "-c", path / "ek.ctx", "-u", path / "ek.pub")
    assert (path / "ek.pub").read_bytes()[2:] == public
    tool(tcti, "tpm2_flushcontext", "-t")
