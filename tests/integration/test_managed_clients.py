"""Programs that people use a TPM with, on the managed file of a FUSE mount; none runs out of room."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from tests.kernel.harness import PATIENCE, Done, needs, run, servers
from tests.support.fuse import FuseServer, needs_fuse
from tests.support.managed import NO_ROOM
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SECRET: Final = "a secret"  # noqa: S105
UNLOCK: Final = Path(__file__).parents[1] / "support/unlock.py"
PKCS11: Final = Path("/usr/lib/x86_64-linux-gnu/pkcs11/libtpm2_pkcs11.so")
PROVIDERS: Final = ("-provider", "tpm2", "-provider", "default")
TIMES: Final = 5
"""More often than a TPM has slots."""


class World:
    """A managed device, and a folder where programs run that are pointed to it."""

    def __init__(self, device: Path, folder: Path) -> None:
        self.device, self.folder = device, folder
        tcti = f"device:{device}"
        self.env = {
            "TPM2TOOLS_TCTI": tcti,
            "TPM2OPENSSL_TCTI": tcti,
            "TPM2_PKCS11_TCTI": tcti,
            "TPM2_PKCS11_STORE": str(folder),
            "TPM_INTERFACE_TYPE": "dev",
            "TPM_DEVICE": str(device),
            "TPM_DATA_DIR": str(folder),
            "HOME": str(folder),
            "TMPDIR": str(folder),
        }

    def __call__(self, *argv: str | Path, status: int | None = 0, stdin: str = "") -> Done:
        done = run(*argv, status=status, stdin=stdin.encode(), env=self.env, cwd=self.folder)
        assert not NO_ROOM.search(done.stdout + done.stderr), done
        return done

    def refused(self, *argv: str | Path, stdin: str = "") -> str:
        done = self(*argv, status=None, stdin=stdin)
        assert done.status != 0
        assert SECRET not in done.stdout
        return done.stderr

    def extend(self, pcr: int) -> None:
        self("tpm2_pcrextend", f"{pcr}:sha256={'a5' * 32}")


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One for all tests here: what a client leaves is gone with it."""
    needs_fuse()
    for make in servers(tmp_path_factory.mktemp("tpm"), FuseServer):
        yield make("vtpm0").start().device.with_name("vtpmrm0")


@pytest.fixture
def world(device: Path, tmp_path: Path) -> World:
    return World(device, tmp_path)


def needs_program(name: str) -> None:
    needs(shutil.which(name) is not None, f"{name} is missing")


def test_systemd_creds(world: World) -> None:
    needs_program("systemd-creds")
    where = (f"--tpm2-device={world.device}", "--tpm2-pcrs=16", "--name=one")
    for number in range(TIMES):
        world("systemd-creds", "encrypt", "--with-key=tpm2", *where, "-", f"{number}", stdin=SECRET)
        assert world("systemd-creds", "decrypt", *where, f"{number}", "-").stdout == SECRET
    world.extend(16)
    world.refused("systemd-creds", "decrypt", *where, "0", "-")


def test_systemd_cryptenroll_and_the_token_that_unlocks(world: World) -> None:
    for program in ("systemd-cryptenroll", "cryptsetup"):
        needs_program(program)
    world.env["PASSWORD"] = SECRET
    (world.folder / "password").write_text(SECRET)
    with (world.folder / "image").open("wb") as file:
        file.truncate(32 << 20)
    cheap = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000")
    world("cryptsetup", "luksFormat", "-q", *cheap, "image", "password")
    unlock = (sys.executable, UNLOCK, "image", world.device)
    world.refused(*unlock)
    world("systemd-cryptenroll", f"--tpm2-device={world.device}", "--tpm2-pcrs=23", "image")
    assert "systemd-tpm2" in world("cryptsetup", "luksDump", "image").stdout
    for _ in range(TIMES):
        world(*unlock)
    world.extend(23)
    assert "not unlocked" in world.refused(*unlock)
    world("tpm2_pcrreset", "23")
    world(*unlock)


def test_clevis(world: World) -> None:
    needs_program("clevis-encrypt-tpm2")
    for _ in range(TIMES):
        pin = '{"pcr_bank":"sha256","pcr_ids":"16"}'
        sealed = world("clevis", "encrypt", "tpm2", pin, stdin=SECRET).stdout
        assert world("clevis", "decrypt", stdin=sealed).stdout == SECRET
    world.extend(16)
    world.refused("clevis", "decrypt", stdin=sealed)


def test_ssh_keys_of_tpm2_pkcs11_in_two_processes(world: World) -> None:
    for program in ("tpm2_ptool", "ssh-keygen"):
        needs_program(program)
    world("tpm2_ptool", "init")
    words = ("--label=one", "--userpin=user")
    world("tpm2_ptool", "addtoken", "--pid=1", *words, "--sopin=officer")
    world("tpm2_ptool", "addkey", *words, "--algorithm=ecc256")
    (world.folder / "ask").write_text("#!/bin/sh\necho user\n")
    (world.folder / "ask").chmod(0o700)
    (world.folder / "message").write_text("one message\n")
    public = world("ssh-keygen", "-D", PKCS11).stdout
    (world.folder / "key.pub").write_text(public)
    (world.folder / "allowed").write_text(f"me {public}")
    steps = f"""
        export SSH_ASKPASS=./ask SSH_ASKPASS_REQUIRE=force
        ssh-add -s {PKCS11} || exit
        for number in $(seq {TIMES}); do
            ssh-keygen -Y sign -n file -f key.pub <message >"$1.$number" || exit
            ssh-keygen -Y verify -n file -f allowed -I me -s "$1.$number" <message || exit
        done
        echo another | ssh-keygen -Y verify -n file -f allowed -I me -s "$1.1" && exit 1
        exit 0
    """
    agents = [started(world, "ssh-agent", "sh", "-c", steps, "-", name) for name in ("one", "two")]
    for status, said in ended(agents):
        assert status == 0, said
        assert said.count('Good "file" signature for me') == TIMES, said


def started(world: World, *argv: str | Path) -> subprocess.Popen[str]:
    """At the same time as others; what it says comes in one stream."""
    return subprocess.Popen(
        argv,
        cwd=world.folder,
        env={"PATH": "/usr/bin:/bin", **world.env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(processes: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """How each of them ended, and all that it said."""
    said = [process.communicate(timeout=PATIENCE)[0] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


def openssl_key(world: World, name: str, *kind: str) -> None:
    """A key of the TPM, and a certificate that it signs itself."""
    world("openssl", "genpkey", *PROVIDERS, *kind, "-out", f"{name}.key")
    assert "TSS2" in (world.folder / f"{name}.key").read_text()
    subject = ("-subj", f"/CN={name}", "-days", "2", "-out", f"{name}.crt")
    world("openssl", "req", *PROVIDERS, "-x509", "-new", "-key", f"{name}.key", *subject)


def test_keys_and_certificates_of_tpm2_openssl(world: World) -> None:
    needs(Path("/usr/lib/x86_64-linux-gnu/ossl-modules/tpm2.so").exists(), "no tpm2-openssl")
    openssl_key(world, "ca", "-algorithm", "RSA", "-pkeyopt", "bits:2048")
    openssl_key(world, "leaf", "-algorithm", "EC", "-pkeyopt", "group:P-256")
    request = ("-new", "-key", "leaf.key", "-subj", "/CN=leaf", "-out", "leaf.csr")
    world("openssl", "req", *PROVIDERS, *request)
    world("openssl", "req", "-in", "leaf.csr", "-verify", "-noout")
    signed = ("-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-out", "signed.crt")
    world("openssl", "x509", *PROVIDERS, "-req", "-in", "leaf.csr", *signed)
    assert "OK" in world("openssl", "verify", "-CAfile", "ca.crt", "signed.crt").stdout
    world.refused("openssl", "verify", "-CAfile", "ca.crt", "leaf.crt")


def test_a_tls_server_and_clients_of_tpm2_openssl_at_once(world: World) -> None:
    needs(Path("/usr/lib/x86_64-linux-gnu/ossl-modules/tpm2.so").exists(), "no tpm2-openssl")
    openssl_key(world, "server", "-algorithm", "RSA", "-pkeyopt", "bits:2048")
    openssl_key(world, "client", "-algorithm", "EC", "-pkeyopt", "group:P-256")
    server = ("-accept", "127.0.0.1:0", "-naccept", f"{TIMES}", "-Verify", "1")
    mine, theirs = ("-cert", "server.crt", "-key", "server.key"), ("-CAfile", "client.crt")
    strict = "-verify_return_error"
    log = world.folder / "server.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            ["openssl", "s_server", *PROVIDERS, *server, *mine, *theirs, strict],
            cwd=world.folder,
            env={"PATH": "/usr/bin:/bin", **world.env},
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=out,
        )
    try:
        listens = re.compile(r"ACCEPT \S+:(\d+)")
        wait_until(
            lambda: listens.search(log.read_text()) is not None, "it listens", process=process
        )
        found = listens.search(log.read_text())
        assert found is not None
        mine, theirs = ("-cert", "client.crt", "-key", "client.key"), ("-CAfile", "server.crt")
        to = ("-connect", f"127.0.0.1:{found[1]}")
        clients = [
            started(world, "openssl", "s_client", *PROVIDERS, *to, *mine, *theirs, strict)
            for _ in range(TIMES)
        ]
        for status, said in ended(clients):
            assert status == 0, (said, log.read_text())
            assert "Verify return code: 0 (ok)" in said
        assert process.wait(PATIENCE) == 0, log.read_text()
        assert log.read_text().count("subject=CN = client") == TIMES, log.read_text()
    finally:
        process.kill()
        process.communicate()


def test_programs_of_ibm_tss2(world: World) -> None:
    """Each is a client of its own, which flushes nothing and leaves nothing."""
    needs_program("tsscreateprimary")
    for _ in range(TIMES):
        assert "Handle 80000000" in world("tsscreateprimary", "-hi", "o", "-ecc", "nistp256").stdout
        assert "Handle" in world("tssstartauthsession", "-se", "p").stdout
    world("tpm2_createprimary", "-Q", "-C", "o", "-G", "ecc", "-c", "primary")
    world("tpm2_evictcontrol", "-Q", "-C", "o", "-c", "primary", "0x81000010")
    parent = ("-hp", "81000010")
    files = ("-opr", "key.private", "-opu", "key.public")
    world("tsscreate", *parent, "-si", "-ecc", "nistp256", *files)
    assert (
        "80000000" in world("tssload", *parent, "-ipr", "key.private", "-ipu", "key.public").stdout
    )
    world(
        "tpm2_create",
        "-Q",
        "-C",
        "0x81000010",
        "-G",
        "ecc:ecdsa",
        "-c",
        "key",
        *("-u", "u", "-r", "r"),
    )
    world("tpm2_evictcontrol", "-Q", "-C", "o", "-c", "key", "0x81000011")
    (world.folder / "message").write_text("one message")
    (world.folder / "other").write_text("another")
    key = ("-hk", "81000011", "-ecc", "-halg", "sha256")
    for _ in range(TIMES):
        world("tsssign", *key, "-if", "message", "-os", "signature")
        world("tssverifysignature", *key, "-is", "signature", "-if", "message")
    assert (
        "TPM_RC_SIGNATURE"
        in world("tssverifysignature", *key, "-is", "signature", "-if", "other", status=None).stdout
    )
    for handle in ("0x81000011", "0x81000010"):
        world("tpm2_evictcontrol", "-Q", "-C", "o", "-c", handle)
