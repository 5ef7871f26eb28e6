"""Who is at the other end of a Unix socket, as the kernel noted at connect(2)."""

from __future__ import annotations

import os
import socket
import struct
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    import trio

NO_UID: Final = 0xFFFF_FFFF
"""Where the kernel names no user."""

_SO_PEERPIDFD: Final = 77  # asm-generic/socket.h; Python has no name for it
_UCRED: Final = struct.Struct("=iII")  # struct ucred of linux/socket.h
_PIDFD: Final = struct.Struct("=i")


class Credentials(NamedTuple):
    """Who has connected: process, effective user and group, of that moment."""

    pid: int
    uid: int
    gid: int

    @classmethod
    def of(cls, connection: socket.socket | trio.socket.SocketType) -> Credentials:
        """Those of the other end of a Unix socket."""
        found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        return cls(*_UCRED.unpack(found))


def is_connection(found: socket.socket) -> bool:
    """Whether it is a stream of this host, and does not listen: nobody waits when that is closed."""
    kind = found.family, found.type, found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    return kind == (socket.AF_UNIX, socket.SOCK_STREAM, 0)


def tells_process() -> bool:
    """Whether this kernel says which process has connected: Linux 6.5 and newer."""
    here, there = socket.socketpair()
    with here, there:
        fd = _descriptor(here)
    if fd is not None:
        os.close(fd)
    return fd is not None


def process_of(connection: socket.socket) -> int | None:
    """A descriptor (pidfd) of the process that has connected; None where there is none to tell."""
    if connection.family != socket.AF_UNIX or Credentials.of(connection).pid <= 0:
        return None
    return _descriptor(connection)


def _descriptor(connection: socket.socket) -> int | None:
    try:
        found = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD, _PIDFD.size)
    except OSError:  # it has ended, or the kernel is older
        return None
    return int(_PIDFD.unpack(found)[0])
