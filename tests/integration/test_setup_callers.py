"""swtpm_setup as its callers use it: libvirt's command lines, other stores, users, terminals."""

from __future__ import annotations

import contextlib
import os
import pty
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

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
from tests.support.waiting import PATIENCE_SECONDS

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def passphrase(text: bytes) -> Iterator[int]:
    """A descriptor to read it from, once."""
    read_end, write_end = os.pipe()
    os.write(write_end, text)
    os.close(write_end)
    try:
        yield read_end
    finally:
        os.close(read_end)


def call(workshop: Workshop, *words: Word) -> None:
    """As libvirt calls it: the passphrase in a pipe, the log in a file."""
    log = workshop.path / "log"
    with passphrase(b"a passphrase") as fd:
        key = ("--pwdfile-fd", str(fd), "--cipher", "aes-256-cbc")
        run = workshop.run(OURS, "--tpm2", *key, "--logfile", log, *words, pass_fds=(fd,))
    assert run.returncode == 0, log.read_text()


@pytest.mark.parametrize("program", [sockets.OURS, PEER_SWTPM], ids=["ours", "peer"])
def test_libvirt(workshop: Workshop, program: tuple[str, ...]) -> None:
    """First creation, a second start, PCR banks, and a TPM that a migration will bring."""
    state = workshop.new_state("state")
    (workshop.path / "passphrase").write_text("a passphrase")
    key = f"--key=pwdfile={workshop.path}/passphrase,mode=aes-256-cbc"
    create: list[Word] = [
        "--tpm-state",
        state,
        "--vmid",
        "vm1:4dea22b3-1d52-d8f3-2516-782e98ab3fa0",
    ]
    create += ["--createek", "--create-ek-cert", "--create-platform-cert", "--lock-nvram"]
    call(workshop, *create, "--not-overwrite")
    first = (state / "tpm2-00.permall").read_bytes()
    call(workshop, *create, "--not-overwrite")
    assert (state / "tpm2-00.permall").read_bytes() == first
    call(workshop, "--tpm-state", state, "--pcr-banks", "sha1,sha384", "--reconfigure")
    with served(state, key, program=program) as tcti:
        stored = tool(tcti, "tpm2_nvread", "-C", "o", "0x1c00002")
        banks = tool(tcti, "tpm2_getcap", "pcrs").decode()
        assert "sha1: [ 0," in banks
        assert "sha256: [ ]" in banks
    text = succeed(
        "openssl", "x509", "-noout", "-subject", "-inform", "der", "-in", written(workshop, stored)
    )
    assert "CN = vm1:4dea22b3-1d52-d8f3-2516-782e98ab3fa0" in text
    call(workshop, "--tpm-state", state, "--overwrite")
    with served(state, key, program=program) as tcti:
        assert "0x1c00002" not in tool(tcti, "tpm2_getcap", "handles-nv-index").decode().lower()


def written(workshop: Workshop, data: bytes) -> Path:
    path = workshop.path / "certificate"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("maker", [OURS, PEER])
def test_linear_file(workshop: Workshop, maker: str) -> None:
    path = workshop.path / "linear"
    words = ("--tpm2", "--tpm-state", f"file://{path}", "--create-ek-cert")
    run = workshop.run(maker, *words)
    assert run.returncode == 0, run.stderr
    first = path.read_bytes()
    run = workshop.run(OURS, *words)
    assert (run.returncode, run.stderr) == (1, "Found existing TPM state 'permall'.\n")
    assert path.read_bytes() == first
    assert workshop.run(OURS, *words, "--overwrite").returncode == 0
    run = workshop.run(PEER, "--tpm2", "--tpm-state", f"file://{path}", "--reconfigure")
    assert run.returncode == 0, run.stderr
    assert path.read_bytes() != first


def test_another_user(workshop: Workshop) -> None:
    """--runas makes the state that user's; without rights on the directory nothing is done."""
    with tempfile.TemporaryDirectory(prefix="setup-runas.", dir="/tmp") as folder:
        path = Path(folder)
        path.chmod(0o755)
        run_as_nobody(workshop, path / "state")


def run_as_nobody(workshop: Workshop, state: Path) -> None:
    state.mkdir()
    words = ("--tpm2", "--tpm-state", state, "--createek", "--runas", "nobody")
    run = workshop.run(OURS, *words)
    assert run.returncode == 1
    assert run.stderr == f"Need write rights on directory {state} for user nobody.\n"
    os.chown(state, 65534, 65534)
    run = workshop.run(OURS, *words)
    assert run.returncode == 0, run.stderr
    assert (state / "tpm2-00.permall").stat().st_uid == 65534
    assert "Starting vTPM manufacturing as nobody:nogroup @ " in run.stdout


def test_a_terminal_is_shown_one_line(workshop: Workshop) -> None:
    ours, theirs = pty.openpty()
    state = workshop.new_state("state")
    process = subprocess.Popen(
        [OURS, "--tpm2", "--tpm-state", state, "--create-ek-cert"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=workshop.environment,
    )
    os.close(theirs)
    said = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while part := os.read(ours, 4096):
            said += part
    os.close(ours)
    assert process.wait(PATIENCE_SECONDS) == 0
    assert b"\r\x1b[KCreating the RSA 2048 endorsement key ..." in said
    assert said.endswith(b"\r\x1b[KSuccessfully authored TPM state.\r\n")
    assert said.count(b"\n") == 1
