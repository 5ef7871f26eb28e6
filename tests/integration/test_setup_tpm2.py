"""A TPM 2.0 that swtpm_setup made, as other people's programs see it."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.support import sockets
from tests.support.setups import (
    OURS,
    PEER,
    PEER_SWTPM,
    Word,
    Workshop,
    served,
    succeed,
    tool,
)

if TYPE_CHECKING:
    from pathlib import Path

CERTIFICATES = {"rsa2048": "0x1c00002", "secp384r1": "0x1c00016", "platform": "0x1c08000"}
EVERYTHING = ("--create-ek-cert", "--create-platform-cert", "--lock-nvram", "--vmid", "vm 1")


def set_up(workshop: Workshop, name: str, *words: Word, program: str = OURS) -> Path:
    state = workshop.new_state(name)
    run = workshop.run(program, "--tpm2", "--tpm-state", state, *words)
    assert run.returncode == 0, run.stdout + run.stderr
    return state


def nv_indexes(tcti: str) -> set[str]:
    text = tool(tcti, "tpm2_nvreadpublic").decode()
    return {row.rstrip(":").lower() for row in text.splitlines() if row.startswith("0x")}


def test_everything_is_where_the_log_says(workshop: Workshop) -> None:
    files = workshop.new_state("files")
    words = ("--create-spk", "--ecc", "--write-ek-cert-files", files)
    state = set_up(workshop, "state", *EVERYTHING, *words)
    assert {path.name for path in state.iterdir()} == {".lock", "tpm2-00.permall"}
    assert {path.name: path.stat().st_mode & 0o777 for path in files.iterdir()} == {
        "ek-rsa2048.crt": 0o640,
        "ek-secp384r1.crt": 0o640,
    }
    with served(state) as tcti:
        assert nv_indexes(tcti) == set(CERTIFICATES.values())
        handles = set(tool(tcti, "tpm2_getcap", "handles-persistent").decode().split())
        assert {"0x81000001", "0x81010001", "0x81010016"} <= handles
        for kind, index in CERTIFICATES.items():
            stored = tool(tcti, "tpm2_nvread", "-C", "o", index)
            certificate = x509.load_der_x509_certificate(stored)
            assert certificate.subject.rfc4514_string() == "CN=vm 1"
            if kind != "platform":
                assert stored == (files / f"ek-{kind}.crt").read_bytes()
            written = workshop.path / f"{kind}.pem"
            written.write_bytes(certificate.public_bytes(Encoding.PEM))
            verify(workshop, written)
        refused = subprocess.run(
            ["tpm2_nvwrite", "-T", tcti, "-C", "p", "-i", "-", "0x1c00002"],
            check=False,
            capture_output=True,
            input=b"x",
        )
        assert refused.returncode != 0
        assert b"NV access locked" in refused.stderr


def verify(workshop: Workshop, certificate: Path) -> None:
    root, issuer = (
        workshop.ca / name for name in ("swtpm-localca-rootca-cert.pem", "issuercert.pem")
    )
    # The critical SAN of directory names is none that openssl looks into.
    words = ["openssl", "verify", "-ignore_critical", "-CAfile"]
    succeed(*words, root, "-untrusted", issuer, certificate)


def test_without_lock_the_platform_may_write(workshop: Workshop) -> None:
    state = set_up(workshop, "state", "--create-ek-cert")
    with served(state) as tcti:
        succeed("tpm2_nvwrite", "-T", tcti, "-C", "p", "-i", "-", "0x1c00002", text="x")


def ek_spki(tcti: str, words: list[str], path: Path) -> bytes:
    """The endorsement key that tpm2-tools make, as it stands in a certificate."""
    tool(tcti, "tpm2_createek", *words, "-c", path / "ek.ctx", "-f", "pem", "-u", path / "ek.pem")
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    key = load_pem_public_key((path / "ek.pem").read_bytes())
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


@pytest.mark.parametrize("maker", [OURS, PEER])
def test_key_in_the_certificate_is_the_tpms_own(workshop: Workshop, maker: str) -> None:
    """A verifier challenges the certified key, and the TPM answers; so with the peer's TPM."""
    path = workshop.path
    state = set_up(workshop, "state", "--create-ek-cert", program=maker)
    with served(state) as tcti:
        stored = tool(tcti, "tpm2_nvread", "-C", "o", CERTIFICATES["rsa2048"])
        certified = x509.load_der_x509_certificate(stored).public_key()
        spki = certified.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        assert ek_spki(tcti, ["-G", "rsa"], path) == spki
        tool(tcti, "tpm2_flushcontext", "-t")
        public = certified.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        (path / "ek.pem").write_bytes(public)
        challenge(tcti, path)


def challenge(tcti: str, path: Path) -> None:
    """Makes a credential for the key in ek.pem, and lets the persistent key open it."""
    secret = b"a secret of the verifier"
    (path / "secret").write_bytes(secret)
    tool(tcti, "tpm2_createak", "-C", "0x81010001", "-c", path / "ak.ctx", "-n", path / "ak.name")
    name = (path / "ak.name").read_bytes().hex()
    tool(
        *("none", "tpm2_makecredential", "-G", "rsa", "-u", path / "ek.pem", "-n", name),
        *("-s", path / "secret", "-o", path / "credential"),
    )
    tool(tcti, "tpm2_flushcontext", "-t")
    tool(tcti, "tpm2_startauthsession", "--policy-session", "-S", path / "session.ctx")
    tool(tcti, "tpm2_policysecret", "-S", path / "session.ctx", "-c", "e")
    tool(
        *(tcti, "tpm2_activatecredential", "-c", path / "ak.ctx", "-C", "0x81010001"),
        *("-i", path / "credential", "-o", path / "opened"),
        *("-P", f"session:{path / 'session.ctx'}"),
    )
    assert (path / "opened").read_bytes() == secret


def test_getekcertificate(workshop: Workshop) -> None:
    state = set_up(workshop, "state", "--create-ek-cert")
    with served(state) as tcti:
        found = workshop.path / "rsa.der"
        tool(tcti, "tpm2_getekcertificate", "-o", found)
        assert found.read_bytes() == tool(tcti, "tpm2_nvread", "-C", "o", CERTIFICATES["rsa2048"])


def create_primary(template: bytes) -> bytes:
    body = bytes.fromhex("4000000b 00000009 40000009 0000 00 0000 0004 0000 0000")
    body += len(template).to_bytes(2, "big") + template + bytes(6)
    return bytes.fromhex("8002") + (10 + len(body)).to_bytes(4, "big") + b"\0\0\1\x31" + body


def send(tcti: str, path: Path, command: bytes) -> bytes:
    (path / "command").write_bytes(command)
    tool(tcti, "tpm2_send", path / "command", "-o", path / "response")
    response = (path / "response").read_bytes()
    assert response[6:10] == bytes(4), response.hex()
    return response


@pytest.mark.parametrize("flags", [["--allow-signing"], ["--allow-signing", "--decryption"]])
def test_template_of_a_signing_key_makes_that_key(workshop: Workshop, flags: list[str]) -> None:
    state = set_up(workshop, "state", "--create-ek-cert", *flags)
    path = workshop.path
    with served(state) as tcti:
        for index, handle in (("0x1c00004", "0x81010001"), ("0x1c00017", "0x81010016")):
            template = tool(tcti, "tpm2_nvread", "-C", "o", index)
            made = send(tcti, path, create_primary(template))
            kept = path / "public"
            tool(tcti, "tpm2_readpublic", "-c", handle, "-f", "tss", "-o", kept)
            public = kept.read_bytes()
            # Behind header, handle and size of the parameters: the public area with its size.
            assert made[18 : 18 + len(public)] == public
            described = tool(tcti, "tpm2_readpublic", "-c", handle).decode()
            assert "|sign" in described
            assert ("decrypt" in described) is ("--decryption" in flags)
            tool(tcti, "tpm2_flushcontext", "-t")


@pytest.mark.parametrize("maker", [OURS, PEER])
@pytest.mark.parametrize("keyed", [False, True])
def test_state_goes_to_the_other_suite(workshop: Workshop, maker: str, keyed: bool) -> None:
    """Ours serves the peer's TPM, the peer serves ours, with a key and without."""
    (workshop.path / "key").write_text("00112233445566778899aabbccddeeff" * 2)
    words: list[Word] = (
        ["--keyfile", workshop.path / "key", "--cipher", "aes-256-cbc"] if keyed else []
    )
    state = set_up(workshop, "state", *EVERYTHING, *words, program=maker)
    options = [f"--key=file={workshop.path / 'key'},mode=aes-256-cbc"] if keyed else []
    program = sockets.OURS if maker == PEER else PEER_SWTPM
    with served(state, *options, program=program) as tcti:
        assert nv_indexes(tcti) == set(CERTIFICATES.values())
        banks = tool(tcti, "tpm2_getcap", "pcrs").decode()
        assert "sha256: [ 0," in banks
        assert "sha1: [ ]" in banks
    plain = b"\x01\xc0\x00\x02" in (state / "tpm2-00.permall").read_bytes()
    assert plain is not keyed


def test_3072_bits(workshop: Workshop) -> None:
    state = set_up(workshop, "state", "--create-ek-cert", "--rsa-keysize", "max")
    with served(state) as tcti:
        assert nv_indexes(tcti) == {"0x1c0001c", "0x1c00016"}
        stored = tool(tcti, "tpm2_nvread", "-C", "o", "0x1c0001c")
        described = tool(tcti, "tpm2_readpublic", "-c", "0x8101001c").decode()
    key = x509.load_der_x509_certificate(stored).public_key()
    assert getattr(key, "key_size", 0) == 3072
    numbers = key.public_numbers()  # type: ignore[union-attr]
    assert f"{numbers.n:x}" in described  # type: ignore[union-attr]


def test_reconfigure_changes_the_banks_and_nothing_else(workshop: Workshop) -> None:
    state = set_up(workshop, "state", "--create-ek-cert")
    with served(state) as tcti:
        before = tool(tcti, "tpm2_nvread", "-C", "o", CERTIFICATES["rsa2048"])
    words: list[Word] = ["--tpm2", "--tpm-state", state, "--reconfigure", "--pcr-banks", "sha384"]
    run = workshop.run(OURS, *words, "--pcr-banks", "sha1")
    assert run.returncode == 0, run.stderr
    assert "Successfully activated PCR banks sha384,sha1 among sha1,sha256,sha384,sha512." in (
        run.stdout
    )
    with served(state) as tcti:
        banks = tool(tcti, "tpm2_getcap", "pcrs").decode()
        assert "sha1: [ 0," in banks
        assert "sha256: [ ]" in banks
        assert "sha384: [ 0," in banks
        assert tool(tcti, "tpm2_nvread", "-C", "o", CERTIFICATES["rsa2048"]) == before
