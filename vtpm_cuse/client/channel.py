"""A vTPM behind a control channel: TCP or Unix socket, one connection for each request."""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from functools import partial
from typing import TYPE_CHECKING, Final

from vtpm_cuse.client.base import Control, check_size
from vtpm_cuse.errors import FrontendError
from vtpm_cuse.wire.layout import BIG
from vtpm_cuse.wire.ptm import (
    PTM_SPECS,
    PtmBlobType,
    PtmCommand,
    PtmGetStateRequest,
    PtmGetStateResponse,
    PtmInfoResponse,
    PtmResultResponse,
    PtmSetStateRequest,
    PtmStateFlag,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from vtpm_cuse.wire.layout import WireStruct

_PATIENCE_SECONDS: Final = 10
_ANSWER_SECONDS: Final = 60
"""For a whole answer: one that comes byte by byte must end some day, too."""

_UNIX_PATH_BYTES: Final = 107  # of sun_path, without the NUL


class SocketControl(Control):
    """Connects at once, for the first request, and again for every later one.

    Args:
        connect: Makes a connection; see `unix_channel` and `tcp_channel`.
    """

    def __init__(self, connect: Callable[[], socket.socket]) -> None:
        self._connect = connect
        self._next: socket.socket | None = connect()

    def close(self) -> None:
        """Closes a connection that no request has used."""
        if self._next is not None:
            self._next.close()
            self._next = None

    def get_state(self, kind: PtmBlobType, flags: PtmStateFlag) -> bytes:
        """The whole state blob, which comes in one message."""
        body = PtmGetStateRequest(flags, kind, 0)
        return self._request_for(PtmGetStateResponse, PtmCommand.PTM_GET_STATEBLOB, body).data

    def set_state(self, kind: PtmBlobType, blob: bytes) -> None:
        """Gives the vTPM a state blob."""
        self.request(PtmCommand.PTM_SET_STATEBLOB, PtmSetStateRequest(0, kind, len(blob), blob))

    def _exchange(self, command: PtmCommand, body: WireStruct) -> WireStruct:
        connection, self._next = self._next or self._connect(), None
        with connection:
            try:
                connection.sendall(struct.pack(">I", command + 1) + body.pack(BIG))
                until = time.monotonic() + _ANSWER_SECONDS
                return _receive(connection, PTM_SPECS[command].response, until)
            except BlockingIOError as exc:
                raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)) from exc


def unix_channel(path: str) -> SocketControl:
    """A vTPM at a Unix socket. Raises FrontendError."""
    if len(os.fsencode(path)) > _UNIX_PATH_BYTES:
        raise FrontendError("Socket path is too long.")
    return SocketControl(partial(_connect_unix, path))


def tcp_channel(host: str, port: int) -> SocketControl:
    """A vTPM at a TCP port. Raises FrontendError."""
    return SocketControl(partial(_connect_tcp, host, port))


def _connect_unix(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    try:
        _limit_waiting(connection)
        connection.connect(path)
    except BlockingIOError:
        connection.close()
        raise FrontendError("Could not connect using UnixIO socket.", "it is busy") from None
    except OSError as exc:
        connection.close()
        raise FrontendError(f"Connect failed: {exc.strerror}") from exc
    return connection


def _connect_tcp(host: str, port: int) -> socket.socket:
    where = f"host '{host}' on port '{port}'"
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "it is no host name"
        raise FrontendError(f"getaddrinfo failed on host '{host}': {reason}") from exc
    failure: OSError | None = None
    for family, kind, protocol, _, address in found:
        connection = socket.socket(family, kind, protocol)
        try:
            _limit_waiting(connection)
            connection.connect(address)
        except OSError as exc:
            connection.close()
            failure = exc
        else:
            return connection
    reason = failure.strerror if failure else "no address"
    raise FrontendError(f"Could not connect to {where} using TCP socket: {reason}") from failure


def _limit_waiting(connection: socket.socket) -> None:
    # Not settimeout(): that makes the socket non-blocking, and connect() to a Unix socket with a
    # full backlog would then fail instead of waiting for its turn.
    limit = struct.pack("@ll", _PATIENCE_SECONDS, 0)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)


def _receive(connection: socket.socket, kind: type[WireStruct], until: float) -> WireStruct:
    """One answer: just the result if that is not 0, else all of *kind*."""
    data = _receive_exactly(connection, PtmResultResponse.SIZE, until)
    # GET_CAPABILITY has no result, but the upper half of its mask is 0 and takes that place.
    failed = PtmResultResponse.unpack_untrusted(data, BIG)
    if failed.result:
        return failed
    data += _receive_exactly(connection, kind.SIZE - len(data), until)
    answer = kind.unpack_untrusted(data, BIG)
    if isinstance(answer, PtmGetStateResponse | PtmInfoResponse):
        check_size("Answer", answer.length)
        rest = _receive_exactly(connection, answer.length, until)
        return kind.unpack_untrusted(data + rest, BIG)
    return answer


def _receive_exactly(connection: socket.socket, size: int, until: float) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = connection.recv(min(size - len(data), 1 << 16))
        if not part:
            raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
        if time.monotonic() > until:
            raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
        data += part
    return bytes(data)
