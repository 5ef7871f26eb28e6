"""Opens the device of a TPM that is not ours, before privileges are dropped."""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING, Final

from vtpm_cuse.errors import UsageError

if TYPE_CHECKING:
    from vtpm_cuse.config import ChipConfig

_HINTS: Final = {
    errno.EBUSY: "another program has it open, which 'fuser -v' names: end it (tpm2-abrmd, say), "
    "or use the kernel's own manager, /dev/tpmrm0",
    errno.ENOENT: "is there a TPM? 'ls /dev/tpm*' shows those of the kernel's",
    errno.ENODEV: "its driver has no TPM: see dmesg",
    errno.EACCES: "run it as root, or as one of the device's group: see 'ls -l'",
    errno.EPERM: "the container or service has to be allowed this device",
}
_FILE_SYSTEM: Final = "fuse."


def open_chip(config: ChipConfig) -> int:
    """A descriptor of the device, blocking, and nobody else's.

    Raises:
        UsageError: It cannot be opened, or is no device.
    """
    # Kernels that know it keep all others from the TPM; to others it says nothing.
    exclusive = os.O_EXCL if config.exclusive else 0
    try:
        # Non-blocking at first: opening a pipe may wait for its other end.
        fd = os.open(
            config.path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC | exclusive
        )
    except OSError as exc:
        reason = f"Error: Cannot open {config.path}: {exc.strerror}"
        raise UsageError(reason, hint=_HINTS.get(exc.errno or 0, "")) from exc
    status = os.fstat(fd)
    if not (stat.S_ISCHR(status.st_mode) or _is_in_fuse(status)) or os.isatty(fd):
        os.close(fd)
        raise UsageError(f"Error: {config.path} is no TPM device", hint="/dev/tpm0 is one")
    # The kernel's driver then answers errors at once; those of before 5.18 lose them otherwise.
    os.set_blocking(fd, True)
    return fd


def _is_in_fuse(status: os.stat_result) -> bool:
    """Whether a file is one of a FUSE mount, where it may be a device; others would be written over."""
    if not stat.S_ISREG(status.st_mode):
        return False
    number = f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
            fields = [line.partition(" - ") for line in table]
    except OSError:
        return False
    return any(
        number == mount.split()[2] and kind.startswith(_FILE_SYSTEM) for mount, _, kind in fields
    )


def is_below_manager(path: str) -> bool:
    """Whether a device leads to a resource manager, as the kernel's /dev/tpmrmN does."""
    path = os.path.realpath(path)
    try:
        number = os.stat(path).st_rdev
        subsystem = os.readlink(f"/sys/dev/char/{os.major(number)}:{os.minor(number)}/subsystem")
    except OSError:
        subsystem = ""
    return os.path.basename(subsystem) == "tpmrm" or "tpmrm" in os.path.basename(path)
