"""QEMU hands a TPM device of the kernel's on to a guest: as a hardware TPM, which it takes it for.

Nobody resets it for the guest, and it has been started: by the host's kernel, which sends
TPM2_Startup to every new device. SeaBIOS sends another, takes TPM_RC_INITIALIZE for the failure of
the TPM, switches the hierarchies off with the platform's authorisation, which is empty, and does
not measure. They are off until the TPM's next reset. A TPM that nobody has started (``swtpm fuse
--flags startup-none`` in place of the kernel's device) it measures into.
"""

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
from vtpm_cuse.wire.pcapng import CaptureReader

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("warm")

TPM_RC_INITIALIZE: Final = 0x100
BOOT_SECONDS: Final = 240
"""For an emulator in an emulator: it takes half a minute on an idle machine."""


# TPM2_HierarchyControl by the platform; the hierarchy, endorsement, owner, platform; TPMI_NO.
SWITCHED_OFF: Final = [
    tpm.tpm2(
        0x121,
        bytes.fromhex(f"4000000c 00000009 40000009 0000 01 0000 {hierarchy} 00"),
        sessions=True,
    )
    for hierarchy in ("4000000b", "40000001", "4000000c")
]


def test_guest_uses_the_device(tmp_path: Path) -> None:
    needs(shutil.which(PC.program) is not None, f"{PC.program} is missing")
    kernel = find_kernel(tmp_path)
    needs(kernel is not None, "no kernel: kernel-helpers/lab --prepare")
    assert kernel is not None
    ours, theirs = socket.socketpair()
    capture = tmp_path / "capture"
    proxy = Proxy(tmp_path / "proxy", more=("--pcap", f"file={capture}"))
    with ours, theirs, proxy:
        command = [PC.program, "-accel", "tcg", *PC.options, "-m", "192"]
        command += ["-nodefaults", "-no-user-config", "-display", "none"]
        # Unpacked, it need not unpack itself, which takes most of a boot. But an ELF file gets no
        # ACPI tables: it is told where the TPM is.
        command += ["-kernel", str(kernel.image.with_name("vmlinux"))]
        command += ["-initrd", str(kernel.initramfs)]
        command += ["-append", f"{PC.words} tpm_tis.force=1 no_timer_check"]
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
            measured = bytes.fromhex(shell.run("cat /sys/class/tpm/tpm0/pcr-sha256/[0-7]"))
        finally:
            machine.kill()
            machine.wait()
        assert inside == hashlib.sha256(before + b"\x11" * 32).digest()
        assert bytes.fromhex((proxy.sysfs / "pcr-sha256/16").read_text()) == inside
        assert proxy.end() == 0
    assert measured == bytes(8 * 32), "SeaBIOS measures into a TPM that was started: say so above"
    answers = [
        (exchange.command, tpm.code_of(exchange.response or b""))
        for exchange in CaptureReader().feed(capture.read_bytes())
    ]
    refused = answers.index((tpm.TPM2_STARTUP_CLEAR, TPM_RC_INITIALIZE))
    off = [(command, 0) for command in SWITCHED_OFF]
    assert answers[refused + 1 : refused + 4] == off
