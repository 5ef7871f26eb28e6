"""/dev/cuse: how a character device is made, and the channel that serves it."""

from __future__ import annotations

import errno
import os
import select
from typing import Final

from vtpm_cuse.errors import FrontendError
from vtpm_cuse.proto.cuse import init_reply
from vtpm_cuse.proto.device import READ_BUFFER_SIZE

CUSE_PATH: Final = "/dev/cuse"


def open_cuse() -> int:
    """Opens /dev/cuse, for one device; the descriptor is the caller's.

    Raises:
        FrontendError: /dev/cuse is missing or not permitted.
    """
    try:
        return os.open(CUSE_PATH, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as exc:
        raise FrontendError("cuse: device not found, try 'modprobe cuse' first") from exc
    except OSError as exc:
        hint = "try 'modprobe cuse' first" if exc.errno == errno.ENODEV else "run it as root"
        raise FrontendError(f"cuse: cannot open {CUSE_PATH}: {exc.strerror}", hint) from exc


class CuseChannel:
    """One open of /dev/cuse, which is one device: *fd* may have one already."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._buffer = memoryview(bytearray(READ_BUFFER_SIZE))
        self.buffers = [self._buffer]

    def create_device(self, name: str, major: int, minor: int) -> None:
        """Makes /dev/*name* (major 0: the kernel chooses).

        Raises:
            FrontendError: The kernel refused; the message says why as far as it can be told.
        """
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        poll.poll()  # its first request is there as soon as the channel is open
        size = os.readv(self.fd, self.buffers)
        os.write(self.fd, init_reply(self._buffer[:size], name, major, minor))
        # The kernel takes any reply; only a channel that is still alive has a device.
        if any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0)):
            raise FrontendError(*_why_refused(name, major, minor))

    def close(self) -> None:
        """Removes the device; again is harmless."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _why_refused(name: str, major: int, minor: int) -> tuple[str, str]:
    """The kernel says it in its log only, and not even there for a name."""
    if os.path.exists(f"/sys/class/cuse/{name.replace('/', '!')}"):
        return f"The device name '{name}' is taken", "choose another with -n"
    if major and os.path.exists(f"/sys/dev/char/{major}:{minor}"):
        return f"The device number {major}:{minor} is taken", "choose another with -M and -m"
    return f"The kernel refused to make /dev/{name} ({major}:{minor})", "see dmesg"
