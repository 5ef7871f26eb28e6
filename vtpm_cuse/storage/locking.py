"""The lock on a state: on a whole file, and against the C suite's as well.

It is an open-file-description lock. One process' conflicts with another's, and with the POSIX
record locks of the C suite. Other than those it stays whatever other descriptor of the file is
closed, and goes along with a fork and with a descriptor that is handed over.
"""

from __future__ import annotations

import fcntl
import os
import struct


def take_lock(fd: int) -> None:
    """Takes the lock, or fails at once. Raises OSError: EAGAIN where another has it."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _whole_file(fcntl.F_WRLCK))


def give_up_lock(fd: int) -> None:
    """Lets others have it, whoever else has the descriptor."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _whole_file(fcntl.F_UNLCK))


def _whole_file(kind: int) -> bytes:
    """A ``struct flock``: kind, whence, start, length, and a process id that must be 0."""
    return struct.pack("hhqqi0q", kind, os.SEEK_SET, 0, 0, 0)
