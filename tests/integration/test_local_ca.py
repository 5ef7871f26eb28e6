"""swtpm_localca as a program: many at once, beside the C suite, with tokens, without root."""

from __future__ import annotations

import os
import pwd
import shutil
import ssl
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from tests.support.certificates import Parts, TestCa, der_of, make_ca, verify
from tests.support.processes import in_child
from tests.support.waiting import PATIENCE_SECONDS
from vtpm_cuse.cli.ca import swtpm_localca

PEER = shutil.which("swtpm_localca", path="/usr/bin") or ""
OURS = str(Path(sys.executable).parent / "swtpm_localca")
OUR_CERT = str(Path(sys.executable).parent / "swtpm_cert")
MODULUS = f"{rsa.generate_private_key(65537, 2048).public_key().public_numbers().n:x}"
POINT = ec.generate_private_key(ec.SECP384R1()).public_key().public_numbers()
ECC = f"x={POINT.x:096x},y={POINT.y:096x},id=secp384r1"
TPM = [
    *("--tpm-manufacturer", "id:00001014", "--tpm-model", "swtpm", "--tpm-version", "id:2024"),
    *("--tpm-spec-family", "2.0", "--tpm-spec-level", "0", "--tpm-spec-revision", "183"),
]
PIN = "4321"

needs_peer = pytest.mark.skipif(not PEER, reason="needs the C suite's swtpm_localca")
needs_token = pytest.mark.skipif(shutil.which("softhsm2-util") is None, reason="needs softhsm2")


def config_of(tmp_path: Path, more: str = "", ca: TestCa | None = None, key: str = "") -> list[str]:
    folder = tmp_path / "ca"
    (tmp_path / "config").write_text(
        f"statedir = {folder}\nsigningkey = {key or (ca.key if ca else folder / 'signkey.pem')}\n"
        f"issuercert = {ca.certificate if ca else folder / 'issuercert.pem'}\n{more}"
    )
    (tmp_path / "options").write_text(
        "--platform-manufacturer Fedora\n--platform-version 2.1\n--platform-model QEMU\n"
    )
    return ["--configfile", str(tmp_path / "config"), "--optsfile", str(tmp_path / "options")]


def start(program: str, out: Path, words: list[str]) -> subprocess.Popen[str]:
    out.mkdir(exist_ok=True)
    return subprocess.Popen(
        [program, *TPM, "--dir", str(out), *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(program: str, out: Path, words: list[str], status: int = 0) -> tuple[str, str]:
    with start(program, out, words) as process:
        output, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == status, (output, errors)
    assert "Traceback" not in errors
    return output, errors


def serial_of(path: Path) -> int:
    data = path.read_bytes()
    return int.from_bytes(Parts.of(data[7:] if data[0] == 0x10 else data).serial, "big")


def test_many_at_once_on_a_new_ca(tmp_path: Path) -> None:
    """One of them makes the CA; each gets a serial number of its own."""
    words = [*config_of(tmp_path), "--type", "ek", "--ek", MODULUS, "--tpm2"]
    processes = [start(OURS, tmp_path / f"out{n}", words) for n in range(6)]
    outputs = [process.communicate(timeout=PATIENCE_SECONDS) for process in processes]
    assert [process.returncode for process in processes] == [0] * 6, outputs
    assert sum("Creating root CA" in output for output, _ in outputs) == 1
    paths = [tmp_path / f"out{n}" / "ek.cert" for n in range(6)]
    serials = sorted(map(serial_of, paths))
    assert serials == list(range(serials[0], serials[0] + 6))
    for path in paths:
        verify(path.read_bytes(), der_of(tmp_path / "ca" / "issuercert.pem"))
    assert (tmp_path / "ca" / "certserial").read_text() == str(serials[-1])


def test_openssl_verifies_the_chain(tmp_path: Path) -> None:
    base = config_of(tmp_path)
    for name, words in {
        "rsa": ["--type", "ek", "--ek", MODULUS],
        "ecc": ["--type", "ek", "--key", ECC, "--vmid", "vm:1", "--allow-signing"],
        "platform": ["--type", "platform", "--ek", MODULUS],
    }.items():
        run(OURS, tmp_path / name, [*base, *words, "--tpm2"])
        path = next((tmp_path / name).iterdir())
        assert path.name == ("platform.cert" if name == "platform" else "ek.cert")
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        ca = tmp_path / "ca"
        (ca / "x").write_text(ssl.DER_cert_to_PEM_cert(path.read_bytes()))
        chain = ["-CAfile", str(ca / "swtpm-localca-rootca-cert.pem")]
        chain += ["-untrusted", str(ca / "issuercert.pem")]
        done = subprocess.run(
            ["openssl", "verify", "-x509_strict", *chain, "-ignore_critical", str(ca / "x")],
            check=False,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done


@needs_peer
@pytest.mark.parametrize("password", ["", "signingkey_password = geheim\n"])
@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_one_folder_for_both_suites(first: str, password: str, tmp_path: Path) -> None:
    """Either makes the CA; both go on counting, and say the same."""
    base = config_of(tmp_path, password)
    programs = [OURS, PEER] if first == "ours" else [PEER, OURS]
    for version in (["--tpm2"], []):
        for kind in ("ek", "platform"):
            made: list[bytes] = []
            for program in (*programs, programs[0]):
                out = tmp_path / f"{Path(program).parent.name}-{len(made)}-{kind}-{version}"
                words = [*base, *version, "--type", kind, "--ek", MODULUS, "--vmid", "vm,1+2:é"]
                output, errors = run(program, out, words)
                name = "EK" if kind == "ek" else kind
                assert output.endswith(f"Successfully created {name} certificate locally.\n")
                assert not errors
                made.append((out / f"{kind}.cert").read_bytes())
            parts = [Parts.of(data[0 if version else 7 :]) for data in made]
            serials = [int.from_bytes(part.serial, "big") for part in parts]
            assert serials == [serials[0], serials[0] + 1, serials[0] + 2]
            for part in parts[1:]:
                assert part.subject == parts[0].subject
                assert part.issuer == parts[0].issuer
                assert part.extensions == parts[0].extensions
                assert part.end == parts[0].end


def test_log_file(tmp_path: Path) -> None:
    base = [*config_of(tmp_path), "--logfile", str(tmp_path / "log"), "--ek", MODULUS, "--tpm2"]
    assert run(OURS, tmp_path / "out", [*base, "--type", "ek"]) == ("", "")
    said = (tmp_path / "log").read_text().splitlines()
    assert said[-1] == "Successfully created EK certificate locally."
    _, errors = run(OURS, tmp_path / "out", [*base, "--type", "foo"], status=1)
    assert "Unknown certificate type 'foo'." in errors
    assert "Unknown certificate type 'foo'." in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ek", "12x4"], "Illegal hex character 'x'."),
        (["--ek", "x=1"], "neither a modulus nor"),
        (["--ek", "x=11,y=22,id=secp256r1"], "no point of secp256r1"),
        (["--ek", MODULUS, "--dir", "/no/such"], "There is no folder /no/such"),
        (["--ek", MODULUS, "--optsfile", "/no/such"], "Need read rights on options file /no/such"),
        (["--ek", MODULUS, "--configfile", "/no/such"], "Need read rights on config file /no/such"),
        ([], "The TPM's key is required."),
    ],
)
def test_errors_name_what_is_at_fault_and_leave_nothing(
    words: list[str], said: str, tmp_path: Path
) -> None:
    base = [*config_of(tmp_path), "--type", "ek", "--tpm2"]
    _, errors = run(OURS, tmp_path / "out", [*base, *words], status=1)
    assert "Could not create EK certificate locally\n" in errors
    assert said in errors
    assert not (tmp_path / "ca").exists()
    assert not list((tmp_path / "out").iterdir())


# -- PKCS #11 -----------------------------------------------------------------------------------


@pytest.fixture(params=["rsa", "p384"])
def token(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> TestCa:
    """A CA whose key is in a token "ca", and nowhere else."""
    config = tmp_path / "softhsm2.conf"
    (tmp_path / "tokens").mkdir()
    config.write_text(f"directories.tokendir = {tmp_path / 'tokens'}\n")
    ca = make_ca(tmp_path / "made", request.param)
    environ = {**os.environ, "SOFTHSM2_CONF": str(config)}
    for words in (
        ["--init-token", "--free", "--label", "ca", "--pin", PIN, "--so-pin", "8765"],
        ["--import", ca.key, "--token", "ca", "--label", "the key", "--id", "a1", "--pin", PIN],
    ):
        subprocess.run(["softhsm2-util", *words], check=True, capture_output=True, env=environ)
    ca.key.unlink()
    monkeypatch.delenv("SOFTHSM2_CONF", raising=False)
    return ca


@needs_token
def test_a_key_in_a_token(token: TestCa, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    uri = "pkcs11:token=ca\\;object=the%20key\\;type=private"
    more = f"env:SOFTHSM2_CONF = {tmp_path / 'softhsm2.conf'}\n"
    base = ["--type", "ek", "--ek", MODULUS]
    for number, pin in enumerate((f"SWTPM_PKCS11_PIN = {PIN}\n", f"signingkey_password={PIN}\n")):
        files = config_of(tmp_path, more + pin, token, uri)
        for version in ([], ["--tpm2"]):
            out = tmp_path / f"{number}{version}"
            run(OURS, out, [*files, *base, *version])
            data = (out / "ek.cert").read_bytes()
            verify(data if version else data[7:], der_of(token.certificate))
            if version:
                found = x509.load_der_x509_certificate(data).signature_hash_algorithm
                assert found is not None
                assert found.name == ("sha256" if "rsa" in request.node.callspec.id else "sha384")
    _, errors = run(OURS, tmp_path / "x", [*config_of(tmp_path, more, token, uri), *base], 1)
    assert "PinIncorrect" in errors  # the default PIN; the C suite tries it for ever
    assert "swtpm-tpmca" not in errors
    assert not list((tmp_path / "x").iterdir())
    assert not (tmp_path / "ca" / "certserial").read_text().startswith("0")


@needs_token
@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("pkcs11:token=ca;id=%a1", ""),
        (f"pkcs11:token=ca;object=the%20key?pin-value={PIN}", ""),
        ("pkcs11:token=ca;object=the%20key?pin-value=0000", "PinIncorrect"),
        ("pkcs11:token=other;object=the%20key", "there is no such token"),
        ("pkcs11:token=ca;object=other", "no such private key"),
        ("pkcs11:object=x?module-path=/no/such.so", "/no/such.so"),
        ("pkcs11:", "neither token nor object"),
        ("tpmkey:uuid=1", "not supported"),
    ],
)
def test_uris_of_keys(uri: str, said: str, token: TestCa, tmp_path: Path) -> None:
    out = tmp_path / "cert"
    words = [*TPM, "--tpm2", "--modulus", MODULUS, "--issuercert", str(token.certificate)]
    done = subprocess.run(
        [OUR_CERT, *words, "--signkey", uri, "--out-cert", str(out)],
        check=False,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        env={
            **os.environ,
            "SOFTHSM2_CONF": str(tmp_path / "softhsm2.conf"),
            "SWTPM_PKCS11_PIN": PIN,
        },
    )
    assert said in done.stderr
    assert "0000" not in done.stderr
    assert "Traceback" not in done.stderr
    assert (done.returncode == 0) == out.exists() == (not said)
    if not said:
        verify(out.read_bytes(), der_of(token.certificate))


# -- without root -------------------------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_a_user_without_root_gets_a_ca_in_the_home_folder() -> None:
    """Also where the machine's configuration names a folder that is not the user's."""
    with tempfile.TemporaryDirectory() as home:
        _as_nobody(Path(home))


@in_child
def _as_nobody(home: Path) -> None:
    nobody = pwd.getpwnam("nobody")
    # What is imported late must be there: the checkout may be below a private folder.
    warm = home / "warm"
    warm.mkdir()
    words = ["swtpm_localca", *TPM, "--ek", MODULUS, "--tpm2", "--type"]
    sys.argv = [*words, "ek", "--dir", str(warm), *config_of(warm)]
    assert swtpm_localca.main() == 0
    os.chown(home, nobody.pw_uid, nobody.pw_gid)
    os.setgroups([])
    os.setgid(nobody.pw_gid)
    os.setuid(nobody.pw_uid)
    os.environ["HOME"] = str(home)
    os.environ.pop("XDG_CONFIG_HOME", None)
    sys.argv = [*words, "platform", "--dir", str(home)]
    assert swtpm_localca.main() == 0
    folder = home / ".config/var/lib/swtpm-localca"
    verify((home / "platform.cert").read_bytes(), der_of(folder / "issuercert.pem"))
    key = serialization.load_pem_private_key((folder / "signkey.pem").read_bytes(), None)
    assert isinstance(key, rsa.RSAPrivateKey)
    assert key.key_size == 3072
