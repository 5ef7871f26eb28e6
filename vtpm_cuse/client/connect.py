"""Connections to the sockets of a vTPM. None waits for ever, for anything."""

from __future__ import annotations

import errno
import math
import os
import socket
import struct
import time
from typing import Any, Final

from vtpm_cuse.errors import FrontendError

PATIENCE_SECONDS: Final = 10
"""For one step: to connect, to send, for the next bytes."""
_UNIX_PATH_BYTES: Final = 107  # of sun_path, without the NUL
_PART_MAX: Final = 1 << 16


def connect_unix(path: str) -> socket.socket:
    """A connection to a Unix socket.

    Raises:
        FrontendError: No socket can have such a path.
        BlockingIOError: Too many others wait there.
        OSError: Nobody is there.
    """
    if len(os.fsencode(path)) > _UNIX_PATH_BYTES:
        raise FrontendError("Socket path is too long.")
    return _connected(socket.AF_UNIX, 0, path)


def connect_tcp(host: str, port: int) -> socket.socket:
    """A connection to a TCP port, by the first address of its host at which somebody is.

    Raises:
        FrontendError: There is no such host.
        BlockingIOError: It has not answered in time.
        OSError: Nobody is there.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "it is no host name"
        raise FrontendError(f"getaddrinfo failed on host '{host}': {reason}") from exc
    failure = OSError(errno.EADDRNOTAVAIL, "no address")
    for family, _, protocol, _, address in found:
        try:
            return _connected(family, protocol, address)
        except OSError as exc:
            failure = exc
    raise failure


def receive(connection: socket.socket, size: int, until: float = math.inf) -> bytes:
    """So many bytes.

    Args:
        connection: Where they come from.
        size: How many.
        until: They are to be there by this time of the monotonic clock.

    Raises:
        EOFError: They end before.
        TimeoutError: They have come too slowly.
        OSError: They cannot be received.
    """
    data = bytearray()
    while len(data) < size:
        part = connection.recv(min(size - len(data), _PART_MAX))
        if not part:
            raise EOFError("it ended")
        if time.monotonic() > until:
            raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
        data += part
    return bytes(data)


# Any: an address is what its family says.
def _connected(family: int, protocol: int, address: str | tuple[Any, ...]) -> socket.socket:
    connection = socket.socket(family, socket.SOCK_STREAM, protocol)
    try:
        # Not settimeout(): that makes the socket non-blocking, and connect() to a Unix socket with
        # a full backlog would then fail instead of waiting for its turn.
        limit = struct.pack("@ll", PATIENCE_SECONDS, 0)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        connection.connect(address)
    except BaseException:
        connection.close()
        raise
    return connection
