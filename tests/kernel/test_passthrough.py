"""QEMU hands a TPM device of the kernel's on to a guest: as a hardware TPM, which it takes it for."""

from __future__ import annotations

import hashlib
import shutil
import socket
import subprocess
from typing import TYPE_CHECKING, Final

import pytest

from tests.kernel.harness import needs
from tests.kernel.proxy import Proxy
from tests.qemu.boards import PC
from tests.qemu.guest import Shell, find_kernel
from tests.support import commands as tpm

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("warm")

BOOT_SECONDS: Final = 240
"""For an emulator in an emulator: it takes half a minute on an idle machine."""


def test_guest_uses_the_device(tmp_path: Path) -> None:
    needs(shutil.which(PC.program) is not None, f"{PC.program} is missing")
    kernel = find_kernel(tmp_path)
    needs(kernel is not None, "no kernel: kernel-helpers/lab --prepare")
    assert kernel is not None
    ours, theirs = socket.socketpair()
    with ours, theirs, Proxy(tmp_path / "proxy") as proxy:
        command = [PC.program, "-accel", "tcg", *PC.options, "-m", "192"]
        command += ["-nodefaults", "-no-user-config", "-display", "none"]
        command += ["-kernel", str(kernel.image), "-initrd", str(kernel.initramfs)]
        command += ["-append", PC.words]
        command += ["-serial", f"file:{tmp_path / 'console'}"]
        command += ["-chardev", f"socket,id=shell,fd={theirs.fileno()}", "-serial", "chardev:shell"]
        # The driver of the proxy has no file to cancel a command by.
        command += ["-tpmdev", f"passthrough,id=tpm,path={proxy.device},cancel-path=/dev/null"]
        command += ["-device", "tpm-tis,tpmdev=tpm"]
        machine = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], cwd=tmp_path
        )
        theirs.close()
        try:
            shell = Shell(ours)
            shell.wait_ready(BOOT_SECONDS)
            before = bytes.fromhex(shell.run("cat /sys/class/tpm/tpm0/pcr-sha256/16"))
            (answer,) = shell.tpm(tpm.pcr_extend(16, b"\x11" * 32))
            assert tpm.code_of(answer) == 0
            inside = bytes.fromhex(shell.run("cat /sys/class/tpm/tpm0/pcr-sha256/16"))
        finally:
            machine.kill()
            machine.wait()
        assert inside == hashlib.sha256(before + b"\x11" * 32).digest()
        assert bytes.fromhex((proxy.sysfs / "pcr-sha256/16").read_text()) == inside
        assert proxy.end() == 0
