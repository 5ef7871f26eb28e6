"""The command lines of those who start machines and their TPMs, word by word.

Incus: internal/server/device/tpm.go. Proxmox: start_swtpm of qemu-server. systemd-vmspawn: start_tpm,
and manufacture_swtpm, of systemd 262. libvirt is there as a whole.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from tests.qemu.machine import BOUND, PATIENCE_SECONDS
from tests.support.setups import make_workshop
from tests.support.sockets import listens
from tests.support.waiting import wait_until

QEMU: Final = "qemu-system-x86_64"
PROGRAMS: Final = Path(sys.executable).parent


class Caller(NamedTuple):
    """What is said at each start of a machine, with {folder} and {config} for what it has there.

    Attributes:
        setups: Before the TPM is started.
        emulator: The TPM.
        socket: Where QEMU then finds it, in the folder.
        state: Where what is set up is kept.
    """

    name: str
    setups: tuple[str, ...]
    emulator: str
    socket: str
    state: str = "tpm2-00.permall"


INCUS: Final = Caller(
    "incus",
    (),
    "swtpm socket --tpm2 --tpmstate dir={folder} --ctrl type=unixio,path=swtpm-vtpm.sock",
    "swtpm-vtpm.sock",
)
PROXMOX: Final = Caller(
    "proxmox",
    (
        "swtpm_setup --tpmstate file://{folder}/disk --createek --create-ek-cert"
        " --create-platform-cert --lock-nvram --config {config} --runas 0 --not-overwrite --tpm2 --ecc",
    ),
    "swtpm socket --tpmstate backend-uri=file://{folder}/disk,mode=0600"
    " --ctrl type=unixio,path={folder}/100.swtpm,mode=0600 --pid file={folder}/100.swtpm.pid"
    " --terminate --daemon --log 'file={folder}/log,level=1,prefix=[id=1764500000] ' --tpm2",
    "100.swtpm",
    "disk",
)
VMSPAWN: Final = Caller(
    "vmspawn",
    (
        "swtpm_setup --tpm2 --print-profiles",
        "swtpm_setup --tpm-state {folder} --tpm2 --pcr-banks sha256 --ecc --createek --create-ek-cert"
        " --create-platform-cert --not-overwrite --config {config} --logfile /dev/null",
    ),
    "systemd-socket-activate --listen {folder}/tpm.sock"
    " swtpm socket --tpm2 --tpmstate dir={folder} --ctrl type=unixio,fd=3",
    "tpm.sock",
)


@pytest.mark.skipif(shutil.which(QEMU) is None, reason=f"needs {QEMU}")
@pytest.mark.parametrize(
    "caller",
    [
        INCUS,
        pytest.param(PROXMOX, marks=pytest.mark.skipif(os.geteuid() != 0, reason="--runas 0")),
        VMSPAWN,
    ],
    ids=lambda caller: caller.name,
)
def test_a_machine_gets_its_tpm_at_each_start(caller: Caller, tmp_path: Path) -> None:
    """The second time it is the same one."""
    workshop = make_workshop(tmp_path)
    folder = workshop.new_state("tpm")
    if caller is PROXMOX:
        (folder / "disk").write_bytes(bytes(4 << 20))
    environment = {**workshop.environment, "PATH": f"{PROGRAMS}:{os.environ['PATH']}"}

    def words(line: str) -> list[str]:
        return shlex.split(line.format(folder=folder, config=workshop.config))

    def set_up() -> bytes:
        for line in caller.setups:
            subprocess.run(words(line), check=True, env=environment, timeout=PATIENCE_SECONDS)
        return (folder / caller.state).read_bytes() if caller.setups else b""

    def run_machine() -> bytes:
        command = [*BOUND, *words(caller.emulator)]
        path = folder / caller.socket
        with subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL
        ) as emulator:
            try:
                wait_until(partial(listens, path), f"the socket of {caller.name}")
                assert "tpm0: model=tpm-tis" in said_by_qemu(path)
                if "--terminate" in caller.emulator:
                    wait_until(lambda: not listens(path), "the end of the TPM")
            finally:
                emulator.terminate()
                end_in_background(folder)
        assert emulator.returncode == 0
        return (folder / caller.state).read_bytes()

    assert set_up().count(b"swtpm-localca") == (3 if caller.setups else 0)
    first = run_machine()
    assert set_up() == (first if caller.setups else b"")
    run_machine()


def said_by_qemu(path: Path) -> str:
    """Which starts a machine that stands still, asks for its TPM, and ends it."""
    board = ("-M", "q35", "-nodefaults", "-display", "none", "-monitor", "stdio", "-S")
    channel = ("-chardev", f"socket,id=tpm,path={path}")
    tpm = ("-tpmdev", "emulator,id=tpm0,chardev=tpm", "-device", "tpm-tis,tpmdev=tpm0")
    done = subprocess.run(
        [QEMU, *board, *channel, *tpm],
        input="info tpm\nquit\n",
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=True,
    )
    return done.stdout


def end_in_background(folder: Path) -> None:
    """Whoever has left a pid file there and is still there."""
    for path in folder.glob("*.pid"):
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            os.kill(int(path.read_text()), signal.SIGKILL)
