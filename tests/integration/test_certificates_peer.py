"""swtpm_cert beside the C suite's: the same words give the same certificate, field by field."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from tests.support.certificates import Parts, TestCa, der_of, make_ca, verify
from tests.support.waiting import PATIENCE_SECONDS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

PEER = shutil.which("swtpm_cert", path="/usr/bin")
OURS = [
    sys.executable,
    "-c",
    "from vtpm_cuse.cli.ca.swtpm_cert import main; raise SystemExit(main())",
]

pytestmark = pytest.mark.skipif(PEER is None, reason="needs the C suite's swtpm_cert")

MODULUS = f"{rsa.generate_private_key(65537, 2048).public_key().public_numbers().n:0512x}"
TPM = ["--tpm-manufacturer", "id:00001014", "--tpm-model", "swtpm", "--tpm-version", "id:2024"]
SPEC = ["--tpm-spec-family", "2.0", "--tpm-spec-level", "0", "--tpm-spec-revision", "183"]
PLATFORM = [
    *("--platform-manufacturer", "Fedora", "--platform-model", "Ä model"),
    *("--platform-version", "2.1"),
]
ALL = [*TPM, *SPEC, *PLATFORM]
RSA = ["--modulus", MODULUS]


def point(curve: str, of: ec.EllipticCurve) -> list[str]:
    numbers = ec.generate_private_key(of).public_key().public_numbers()
    digits = (of.key_size + 7) // 8 * 2
    return [
        *("--ecc-x", f"{numbers.x:0{digits}x}", "--ecc-y", f"{numbers.y:0{digits}x}"),
        *("--ecc-curveid", curve),
    ]


P256 = point("secp256r1", ec.SECP256R1())
P384 = point("secp384r1", ec.SECP384R1())
P521 = point("secp521r1", ec.SECP521R1())

CASES: dict[str, list[str]] = {
    f"{name}-{kind}-{version}": [*key, "--type", kind, *((["--tpm2"]) if version == "2" else [])]
    for name, key in {"rsa": RSA, "p256": P256, "p384": P384, "p521": P521}.items()
    for kind in ("ek", "platform")
    for version in ("1.2", "2")
} | {
    "default type": [*RSA, "--tpm2"],
    "default curve": [*P256[:4], "--tpm2"],
    "upper case": [*RSA, "--tpm2", "--type", "Platform"],
    "signing": [*RSA, "--tpm2", "--allow-signing"],
    "decryption": [*RSA, "--tpm2", "--decryption"],
    "both": [*RSA, "--tpm2", "--allow-signing", "--decryption"],
    "ecc signing": [*P384, "--tpm2", "--allow-signing"],
    "ecc both": [*P384, "--tpm2", "--allow-signing", "--decryption"],
    "platform signing": [*RSA, "--tpm2", "--type", "platform", "--allow-signing"],
    "1.2 signing": [*RSA, "--allow-signing"],
    "subject": [*RSA, "--tpm2", "--subject", "C=US,ST=NY,L=NewYork"],
    "subject, types": [*RSA, "--tpm2", "--subject", "EMAIL=a@b,UID=7,DC=de,cn=ä,O=x y"],
    "subject, escapes": [*RSA, "--tpm2", "--subject", r"CN=a\,b\+c,OU=_"],
    "subject, spaces": [*RSA, "--tpm2", "--subject", " CN =  a=b , O = d,"],
    "subject, 1.2": [*RSA, "--subject", "CN=x"],
    "exponent": [*RSA, "--tpm2", "--exponent", "0x10003"],
    "leading zeros": ["--modulus", "0000" + MODULUS, "--tpm2"],
    "serial": [*RSA, "--tpm2", "--serial", "12345678901234567"],
    "serial with a high bit": [*RSA, "--tpm2", "--serial", "255"],
    "days": [*RSA, "--tpm2", "--days", "30"],
    "days beyond 2050": [*RSA, "--tpm2", "--days", "10000"],
    "no days": [*RSA, "--tpm2", "--days", "0"],
    "for ever": [*RSA, "--tpm2", "--days", "-1"],
    "pem": [*RSA, "--tpm2", "--pem"],
    "header": [*RSA, "--add-header"],
    "one dash": ["-modulus", MODULUS, "-tpm2"],
    "empty names": [*RSA, "--tpm2", "--tpm-model", ""],
    "large numbers": [*RSA, "--tpm2", "--tpm-spec-revision", "70000", "--tpm-spec-level", "0x80"],
}


@pytest.fixture(scope="module")
def cas(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TestCa]:
    """Of sizes with which 0.10 and 0.11 sign alike."""
    return {kind: make_ca(tmp_path_factory.mktemp(kind), kind) for kind in ("rsa", "p256")}


def certify(program: list[str], out: Path, words: list[str]) -> bytes:
    done = subprocess.run(
        [*program, *words, "--out-cert", str(out)],
        check=False,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "LC_ALL": "C.UTF-8"},
    )
    assert done.returncode == 0, done
    assert not done.stderr
    assert out.stat().st_mode & 0o777 == 0o600
    return out.read_bytes()


def bare(data: bytes, tmp_path: Path) -> tuple[bytes, bytes]:
    """What precedes a certificate, and the certificate in DER."""
    if data.startswith(b"-----BEGIN"):
        path = tmp_path / "bare.pem"
        path.write_bytes(data)
        return data[:28], der_of(path)
    if data[0] == 0x10:
        return data[:7], data[7:]
    return b"", data


def compare(ca: TestCa, words: list[str], tmp_path: Path) -> Parts:
    words = [*ca.words, *ALL, *words]
    assert PEER
    before, theirs = bare(certify([PEER], tmp_path / "theirs", words), tmp_path)
    before_ours = datetime.now(UTC).replace(microsecond=0)
    our_before, ours = bare(certify(OURS, tmp_path / "ours", words), tmp_path)
    assert our_before == before
    assert len(ours) - len(theirs) in range(-3, 4)  # ECDSA signatures vary by that much
    verify(ours, der_of(ca.certificate))
    peer, own = Parts.of(theirs), Parts.of(ours)
    assert own.forms_of_time == peer.forms_of_time
    assert own.duration == peer.duration
    assert before_ours <= own.moments[0] <= datetime.now(UTC)
    assert replace(own, start=peer.start, end=peer.end) == replace(
        peer, signature_size=own.signature_size
    )
    return own


@pytest.mark.parametrize("words", CASES.values(), ids=CASES)
def test_same_certificate(words: list[str], cas: dict[str, TestCa], tmp_path: Path) -> None:
    compare(cas["rsa"], words, tmp_path)


@pytest.mark.parametrize("version", [[], ["--tpm2"]])
def test_same_certificate_of_an_ecdsa_ca(
    version: list[str], cas: dict[str, TestCa], tmp_path: Path
) -> None:
    own = compare(cas["p256"], [*RSA, *version], tmp_path)
    assert own.algorithm == own.outer_algorithm


@pytest.mark.parametrize("kind", ["rsa", "ecc"])
def test_public_key_in_a_file(kind: str, cas: dict[str, TestCa], tmp_path: Path) -> None:
    key = (
        rsa.generate_private_key(65537, 3072)
        if kind == "rsa"
        else ec.generate_private_key(ec.SECP256R1())
    )
    pem = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    (tmp_path / "pub.pem").write_bytes(pem)
    compare(cas["rsa"], ["--pubkey", str(tmp_path / "pub.pem"), "--tpm2"], tmp_path)


def test_encrypted_key_and_every_way_to_give_its_password(tmp_path: Path) -> None:
    """Without one, and with a wrong one, nothing is written and nothing is shown of it."""
    secret = "Pass-Wörter"  # noqa: S105 - of a key made below
    ca = make_ca(tmp_path / "ca", password=secret.encode())
    (tmp_path / "password").write_text(secret)
    os.environ["CA_TEST_PASSWORD"] = secret
    for spec in (
        *(["--signkey-pwd", spec] for spec in ("env:CA_TEST_PASSWORD", f"pass:{secret}", secret)),
        ["--signkey-pwd", f"file:{tmp_path / 'password'}"],
        ["--signkey-password", secret],
    ):
        compare(ca, [*RSA, "--tpm2", *spec], tmp_path)
    for wrong in ([], ["--signkey-password", "x" * 11], ["--signkey-pwd", "env:NO_SUCH_NAME"]):
        words = [*OURS, *ca.words, *ALL, *RSA, *wrong, "--out-cert", str(tmp_path / "none")]
        done = subprocess.run(
            words, check=False, capture_output=True, text=True, timeout=PATIENCE_SECONDS
        )
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "none").exists()
        assert secret not in done.stderr
        assert "x" * 11 not in done.stderr


def fails(program: Sequence[str], *words: str) -> str:
    """What a call that fails says."""
    done = subprocess.run(
        [*program, *words], check=False, capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )
    assert done.returncode == 1
    return done.stderr


ERRORS: dict[str, tuple[list[str], str]] = {
    "no key": ([], "Missing public EK file and modulus or ECC parameters."),
    "both keys": ([*RSA, *P256], "RSA modulus and ECC parameters cannot both be given."),
    "half a point": ([*P256[:2]], "ECC x and y parameters must both be given."),
    "curve": ([*P256[:4], "--ecc-curveid", "foo"], "Unsupported ECC curve id: foo"),
    "hex": (["--modulus", "1z"], "Illegal hex character 'z'."),
    "odd": (["--modulus", "123"], "Got an odd number of hex digits (3)."),
    "type": ([*RSA, "--type", "foo"], "Unknown certificate type 'foo'."),
    "serial": ([*RSA, "--serial", "x"], "Serial number is invalid."),
    "long serial": ([*RSA, "--serial", str(1 << 160)], "Serial number is "),
    "exponent": ([*RSA, "--exponent", "x"], "Exponent is wrong and cannot be 0."),
    "level": (
        [*RSA, "--tpm-spec-level", "-1"],
        "--tpm-spec-level must pass a positive number.",
    ),
    "subject": (
        [*RSA, "--tpm2", "--subject", "CN="],
        "Could not set DN on CRT: Error in parsing.",
    ),
    "subject, plus": (
        [*RSA, "--tpm2", "--subject", "CN=a+OU=b"],
        "Could not set DN on CRT: Error in parsing.",
    ),
    "subject, attribute": (
        [*RSA, "--tpm2", "--subject", "FOO=a"],
        "Could not set DN on CRT: Error in parsing.",
    ),
}


@pytest.mark.parametrize(("words", "text"), ERRORS.values(), ids=ERRORS)
def test_same_first_sentence_of_an_error(
    words: list[str], text: str, cas: dict[str, TestCa], tmp_path: Path
) -> None:
    assert PEER
    for program in ([PEER], OURS):
        said = fails(program, *cas["rsa"].words, *ALL, *words, "--out-cert", str(tmp_path / "none"))
        assert said.startswith(text)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("missing", "text"),
    [
        (
            "--tpm-model",
            "--tpm-manufacturer and --tpm-model and --tpm version must all be provided",
        ),
        (
            "--platform-model",
            "--platform-manufacturer and --platform-model and --platform version must all be "
            "provided",
        ),
        (
            "--tpm-spec-level",
            "--tpm-spec-family and --tpm-spec-level and --tpm-spec-revision must all be provided",
        ),
        ("--issuercert", "The issuer certificate name is required."),
        ("--signkey", "Missing signature key."),
    ],
)
def test_same_sentence_when_something_is_missing(
    missing: str, text: str, cas: dict[str, TestCa], tmp_path: Path
) -> None:
    words = [*cas["rsa"].words, *ALL, *RSA]
    at = words.index(missing)
    del words[at : at + 2]
    kind = "platform" if "platform" in missing else "ek"
    assert PEER
    for program in ([PEER], OURS):
        said = fails(program, *words, "--type", kind, "--out-cert", str(tmp_path / "none"))
        assert said.startswith(text)


@pytest.mark.parametrize("name", ["exponent", "days", "serial", "tpm-spec-level", "modulus"])
def test_a_number_without_end(name: str, cas: dict[str, TestCa], tmp_path: Path) -> None:
    """More digits than Python takes for a number."""
    words = [*cas["rsa"].words, *ALL, *RSA, f"--{name}", "9" * 9000]
    said = fails(OURS, *words, "--out-cert", str(tmp_path / "none"))
    assert len(said.splitlines()) == 1
    assert len(said) < 200
    assert not (tmp_path / "none").exists()


def test_capabilities_are_the_peers_and_those_of_newer_versions() -> None:
    assert PEER
    peer, own = (
        subprocess.run([*program, "--print-capabilities"], check=True, capture_output=True).stdout
        for program in ([PEER], OURS)
    )
    known, _, _ = peer.partition(b' ], "version"')
    assert own.startswith(known + b', "cmdarg-tpm-serial-num", "supports-iak-idevid"')
