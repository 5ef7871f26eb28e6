"""What a TPM goes on from: bytes that nobody reads here, and that are handed out once."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from vtpm_cuse.fleet.manager.making import Made

WAITING: Final = 256
"""New TPMs, of 3 KB each."""


class Volatile:
    """Of one sleep.

    Args:
        data: The bytes.
        outlives: They are in a file in memory, which may outlive this process. Where there is none to be
            had they are in this process alone: lost with it, and never used twice.

    Attributes:
        fd: Of that file.
    """

    def __init__(self, data: bytes, *, outlives: bool) -> None:
        self._data = data
        self.fd: int | None = None
        if outlives:
            with contextlib.suppress(OSError), contextlib.ExitStack() as undo:
                fd = os.memfd_create("asleep", os.MFD_CLOEXEC)
                undo.callback(os.close, fd)
                if os.write(fd, data) == len(data):
                    undo.pop_all()
                    self._data, self.fd = b"", fd

    @classmethod
    def resume(cls, data: bytes, fd: int | None) -> Volatile | None:
        """That of an earlier manager; None where it was handed out."""
        found = cls(data, outlives=False)
        found.fd = fd
        if data or (fd is not None and os.fstat(fd).st_size):
            return found
        found.take()
        return None

    def leave(self) -> tuple[bytes, int | None]:
        """It is the next manager's."""
        data, fd, self._data, self.fd = self._data, self.fd, b"", None
        return data, fd

    def take(self) -> bytes:
        """The bytes. Whoever has the file has an empty one from now on: nobody is given them again."""
        data, fd = self.leave()
        if fd is not None:
            data = os.pread(fd, os.fstat(fd).st_size, 0)
            os.ftruncate(fd, 0)
            os.close(fd)
        return data


class FirstStarts:
    """What the newest TPMs go on from when they are first started; it is in this process alone.

    Others, and those that somebody else has powered on in between, are started cold.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, Made] = {}

    def put(self, made: Made) -> None:
        """Of one that has got its name; for which the oldest may have to go."""
        self._waiting[made.id] = made
        if len(self._waiting) > WAITING:
            del self._waiting[next(iter(self._waiting))]

    def take(self, number: str, permanent: bytes) -> Volatile | None:
        """Of the one with that id, if its permanent state is still this one."""
        made = self._waiting.pop(number, None)
        if made is None or not made.saved or made.permanent != permanent:
            return None
        return Volatile(made.saved, outlives=False)

    def forget(self, number: str) -> None:
        """That one is no more."""
        self._waiting.pop(number, None)
