"""A guest that obeys: Debian's kernel with a shell that reads lines from a serial port.

That for amd64 is the lab's, compressed as Debian ships it: booted as an ELF file it
would get no ACPI tables, and without them it looks for no TPM.
"""

from __future__ import annotations

import os
import re
import select
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.support.unstable import ROOT
from tools.guests import BUSYBOX, FOLDER, KERNEL

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping

GUESTS: Final = ROOT / FOLDER

INIT: Final = r"""#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t securityfs securityfs /sys/kernel/security
for module in /tpm/*.ko; do
    [ ! -e "$module" ] || insmod "$module"
done
dmesg -n 1  # nothing between the answers, where console and shell share a port

# tpm DEVICE HEX...: the commands go to one open device; each response is a line.
# The kernel gives a response to the descriptor that wrote the command only.
tpm() {
    exec 3<>"$1" || return
    shift
    for command; do
        echo "$command" | xxd -r -p >/command
        dd bs=4096 count=1 </command >&3 2>/dev/null || return
        dd bs=4096 count=1 <&3 2>/dev/null | xxd -p | tr -d '\n'
        echo
    done
    exec 3>&-
}

exec <>"/dev/$tty" >&0 2>&1
stty raw -echo
echo "<ready>"
while read -r line; do
    eval "$line" </dev/null
    echo "<status $?>"
done
"""
_STATUS: Final = re.compile(rb"<status (\d+)>\n")


@dataclass(frozen=True)
class Kernel:
    """A kernel and what comes into its memory."""

    image: Path
    initramfs: Path


def find_kernel(folder: Path, architecture: str = "amd64") -> Kernel | None:
    """Debian's kernel; the initramfs is made in *folder*. None where it was not fetched."""
    initramfs = folder / f"initramfs-{architecture}"
    entries: dict[str, bytes | None] = {"init": INIT.encode()}
    if architecture == "amd64":
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vtpm-cuse"
        found = sorted(cache.glob("linux-*"), key=lambda path: path.stat().st_mtime)
        if not found:
            return None
        # The kernel unpacks two archives in a row as one. The lab's has busybox in it.
        base, image = (found[-1] / "base.cpio").read_bytes(), found[-1] / "vmlinuz"
    else:
        guest = GUESTS / architecture
        if not guest.exists():
            return None
        base, image = b"", guest / KERNEL
        entries |= dict.fromkeys(("bin", "dev", "proc", "sys", "tpm"))
        entries["bin/busybox"] = (guest / BUSYBOX).read_bytes()
        for module in guest.glob("*.ko"):
            entries[f"tpm/{module.name}"] = module.read_bytes()
    initramfs.write_bytes(base + _archive(entries))
    return Kernel(image, initramfs)


def _archive(entries: Mapping[str, bytes | None]) -> bytes:
    """Executable files, and folders where there is no content, in the format newc."""
    packed = bytearray()
    for number, (name, content) in enumerate([*entries.items(), ("TRAILER!!!", b"")], 1):
        mode, data = (0o40755, b"") if content is None else (0o100755, content)
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        packed += b"070701" + b"".join(b"%08X" % field for field in fields)
        packed += name.encode() + b"\0"
        packed += bytes(-len(packed) % 4) + data
        packed += bytes(-len(packed) % 4)
    return bytes(packed)


class GuestError(Exception):
    """The guest did not do what it was told, or does not answer."""


class Shell:
    """The shell in the guest, at the other end of a serial port."""

    def __init__(self, serial: socket.socket) -> None:
        self._serial = serial
        self._serial.setblocking(False)

    def wait_ready(self, seconds: float) -> None:
        """Waits until the guest has booted."""
        self._read_until(re.compile(rb"<ready>\n"), seconds)

    def run(self, line: str, *, seconds: float = 30) -> str:
        """What a line of shell prints. Raises GuestError when its status is not 0."""
        assert "\n" not in line
        self._serial.send(line.encode() + b"\n")
        output, found = self._read_until(_STATUS, seconds)
        if found[1] != b"0":
            raise GuestError(f"{line!r}: status {found[1].decode()}: {output.decode()}")
        return output.decode()

    def tpm(self, *commands: bytes, device: str = "/dev/tpm0") -> list[bytes]:
        """The TPM's responses to commands, all on one open device."""
        answer = self.run(f"tpm {device} {' '.join(command.hex() for command in commands)}")
        return [bytes.fromhex(line) for line in answer.splitlines()]

    def _read_until(
        self, pattern: re.Pattern[bytes], seconds: float
    ) -> tuple[bytes, re.Match[bytes]]:
        seen = b""
        deadline = time.monotonic() + seconds
        while (found := pattern.search(seen)) is None:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._serial], [], [], left)[0]:
                raise GuestError(f"nothing like {pattern.pattern!r} in {seconds} s, only {seen!r}")
            data = self._serial.recv(65536)
            if not data:
                raise GuestError(f"the machine ended; last came {seen!r}")
            seen += data
        return seen[: found.start()], found
