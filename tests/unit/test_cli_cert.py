"""swtpm_cert's options that the C suite's older versions do not have."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, mlkem

from tests.support.certificates import Parts, TestCa, der_of, elements, make_ca, verify
from vtpm_cuse.cli.ca import swtpm_cert, swtpm_localca
from vtpm_cuse.errors import UsageError
from vtpm_cuse.service.confine import secrecy

if TYPE_CHECKING:
    from pathlib import Path

POINT = ec.generate_private_key(ec.SECP384R1()).public_key().public_numbers()
P384 = ["--ecc-x", f"{POINT.x:096x}", "--ecc-y", f"{POINT.y:096x}", "--ecc-curveid", "secp384r1"]
KEM = mlkem.MLKEM1024PrivateKey.generate().public_key()
PUBLIC = ["--public", KEM.public_bytes_raw().hex(), "--keyalgo", "ml-kem-1024"]
TPM = ["--tpm-manufacturer", "id:1", "--tpm-model", "swtpm", "--tpm-version", "id:2"]
SPEC = ["--tpm-spec-family", "2.0", "--tpm-spec-level", "0", "--tpm-spec-revision", "183"]
SERIAL = ["--tpm-serial-num", "IBM:ab:01"]


@pytest.fixture(autouse=True)
def _shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of this process is hidden from who debugs the tests."""
    monkeypatch.setattr(secrecy, "hide_process", lambda: None)


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> TestCa:
    return make_ca(tmp_path_factory.mktemp("ca"), "p256")


def certified(ca: TestCa, path: Path, *words: str) -> bytes:
    assert swtpm_cert._run([*ca.words, "--out-cert", str(path), *words]) == 0
    verify(path.read_bytes(), der_of(ca.certificate))
    return path.read_bytes()


def usage_of(certificate: bytes) -> bytes:
    """The bits of the key usage, as they are encoded."""
    for row in Parts.of(certificate).extensions:
        (_, identifier), *_, (_, value) = elements(row)
        if identifier == bytes.fromhex("551d0f"):
            return value
    raise AssertionError


@pytest.mark.parametrize("kind", ["iak", "IDevID"])
def test_an_identity_key(kind: str, ca: TestCa, tmp_path: Path) -> None:
    """It needs no maker; what is not asked for is not in it."""
    words = ["--tpm2", "--type", kind, "--subject", "serialNumber=vm1", *SERIAL, *P384]
    made = certified(ca, tmp_path / "c", *words)
    assert x509.load_der_x509_certificate(made).subject.rfc4514_string() == "2.5.4.5=vm1"
    assert usage_of(made).hex() == "03020780"
    assert b"\x04\x09IBM:ab:01" in made
    assert len(Parts.of(made).extensions) == 4


@pytest.mark.parametrize(
    ("words", "usage"),
    [
        (PUBLIC, "03020520"),
        ([*PUBLIC, "--allow-signing"], "03020780"),
        ([*PUBLIC, "--allow-signing", "--decryption"], "030205a0"),
        ([*PUBLIC, "--type", "platform"], "03020520"),
        (P384, "03020308"),
    ],
)
def test_key_usage(words: list[str], usage: str, ca: TestCa, tmp_path: Path) -> None:
    platform = ["--platform-manufacturer", "a", "--platform-model", "b", "--platform-version", "c"]
    made = certified(ca, tmp_path / "c", "--tpm2", *TPM, *SPEC, *platform, *words)
    assert usage_of(made).hex() == usage
    if "--public" in words:
        spki = KEM.public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        assert spki in made


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*P384, "--tpm2", "--type", "iak"], "--tpm-serial-num must be provided"),
        ([*P384, "--type", "idevid", *SERIAL], "An iak or idevid is a TPM 2.0's; see --tpm2"),
        (PUBLIC[:2], "--public requires --keyalgo to specify the key algorithm."),
        (PUBLIC[2:], "Missing --public option for key type ml-kem-1024."),
        ([*PUBLIC[:3], "ml-kem-2048"], "Unsupported key type 'ml-kem-2048'."),
        ([*PUBLIC[:3], "ml-dsa-44"], "--public: a key for ml-dsa-44 has 1312 bytes, and not 1568"),
        (["--public", "0" * 10242, *PUBLIC[2:]], "--public needs 2 to 10240 hex digits"),
        ([*PUBLIC, *P384], "Already found options for 'ecc' key; cannot switch to 'ml-kem-1024'."),
        (["--modulus", "11", *PUBLIC[:2]], "Already found options for 'rsa' key; cannot switch"),
        ([*P384, *TPM, *SPEC, "--days", "-2"], "Days value of '-2' is outside valid range."),
        ([*P384, *TPM, *SPEC, "--days", f"{1 << 31}"], "Days value of '2147483648' is outside"),
    ],
)
def test_words_that_do_not_go_together(
    words: list[str], message: str, ca: TestCa, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as caught:
        swtpm_cert._run([*ca.words, "--out-cert", str(tmp_path / "c"), *words])
    assert str(caught.value).startswith(message)
    assert not (tmp_path / "c").exists()


def test_capabilities(capsys: pytest.CaptureFixture[str]) -> None:
    assert swtpm_cert._run(["--print-capabilities"]) == 0
    assert json.loads(capsys.readouterr().out)["features"] == [
        *("cmdarg-signkey-pwd", "cmdarg-parentkey-pwd", "cmdarg-tpm-serial-num"),
        *("supports-iak-idevid", "cmdarg-public", "cmdarg-keyalgo"),
    ]


def test_the_local_ca_passes_such_keys_on(ca: TestCa, tmp_path: Path) -> None:
    """What the options file says of the TPM counts where nobody else does."""
    (tmp_path / "conf").write_text(
        f"statedir = {tmp_path}\nsigningkey = {ca.key}\nissuercert = {ca.certificate}\n"
    )
    options = tmp_path / "options"
    options.write_text(f"{' '.join(TPM)} {' '.join(SERIAL)}\n")
    base = ["--tpm2", "--configfile", str(tmp_path / "conf"), "--optsfile", str(options)]
    base += ["--dir", str(tmp_path), "--vmid", "vm,1"]
    kem = f"pubkey={PUBLIC[1]},algo={PUBLIC[3]}"
    assert swtpm_localca._run([*base, "--type", "ek", "--ek", kem, *SPEC]) == 0
    point = f"x={P384[1]},y={P384[3]},id=secp384r1"
    assert swtpm_localca._run([*base, "--type", "iak", "--key", point]) == 0
    assert KEM.public_bytes_raw() in (tmp_path / "ek.cert").read_bytes()
    made = (tmp_path / "iak.cert").read_bytes()
    assert x509.load_der_x509_certificate(made).subject.rfc4514_string() == "2.5.4.5=vm_1"
    assert b"IBM:ab:01" in made
    verify(made, der_of(ca.certificate))
