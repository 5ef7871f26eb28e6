"""The kinds of machine that QEMU makes here, with their firmware.

What cannot be made on this system is skipped; ``./setup test`` installs all of it.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final


@dataclass(frozen=True)
class Board:
    """A kind of machine.

    Attributes:
        program: The QEMU that makes it.
        architecture: Debian's name of what its kernel is for.
        options: Processor, memory and the rest.
        words: The kernel's command line; *tty* is where the guest's shell listens.
        console: It has a serial port for the console before the one for the shell.
        firmware: Files that the options name.
    """

    program: str
    architecture: str
    options: tuple[str, ...]
    words: str
    console: bool = False
    firmware: tuple[str, ...] = ()

    def missing(self) -> str | None:
        """What has to be installed before it can be made."""
        for name in (self.program, *self.firmware):
            if shutil.which(name) is None and not Path(name).exists():
                return name
        return None

    def uefi(self, code: str, variables: str, *options: str) -> Board:
        """The same with UEFI, whose variables are forgotten at its end."""
        flash = ["-drive", f"if=pflash,format=raw,readonly=on,file={code}"]
        flash += ["-drive", f"if=pflash,format=raw,snapshot=on,file={variables}"]
        return replace(self, options=(*self.options, *options, *flash), firmware=(code, variables))


_WORDS: Final = "panic=-1 quiet"
# The kernel takes a processor of AMD for one whose TPM gives no random bytes.
PC: Final = Board(
    "qemu-system-x86_64",
    "amd64",
    ("-machine", "q35", "-m", "256", "-cpu", "qemu64,vendor=GenuineIntel"),
    f"console=ttyS0 tty=ttyS1 mitigations=off nokaslr {_WORDS}",
    console=True,
)
"""With SeaBIOS."""
PC_UEFI: Final = PC.uefi("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd")
ARM: Final = Board(
    "qemu-system-aarch64",
    "arm64",
    ("-machine", "virt,gic-version=3", "-m", "512", "-cpu", "cortex-a57"),
    f"console=ttyAMA0 tty=ttyAMA0 nokaslr {_WORDS}",
)
"""Without firmware."""
ARM_UEFI: Final = ARM.uefi(
    "/usr/share/AAVMF/AAVMF_CODE.fd", "/usr/share/AAVMF/AAVMF_VARS.fd", "-m", "1024"
)
# What software emulation has none of.
_BROKEN: Final = ("cap-cfpc=broken", "cap-sbbc=broken", "cap-ibs=broken", "cap-ccf-assist=off")
POWER: Final = Board(
    "qemu-system-ppc64",
    "ppc64el",
    ("-machine", ",".join(("pseries", *_BROKEN)), "-m", "1024", "-cpu", "power9"),
    f"console=hvc0 tty=hvc0 {_WORDS}",
)
"""With SLOF."""
