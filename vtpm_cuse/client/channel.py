"""A vTPM behind a control channel: TCP or Unix socket, one connection for each request."""

from __future__ import annotations

import errno
import os
import struct
import time
from functools import partial
from typing import TYPE_CHECKING, Final

from vtpm_cuse.client.base import Control, check_size
from vtpm_cuse.client.connect import connect_tcp, connect_unix, receive
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
    import socket
    from collections.abc import Callable

    from vtpm_cuse.wire.layout import WireStruct

_ANSWER_SECONDS: Final = 60
"""For a whole answer: one that comes byte by byte must end some day, too."""


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
            except EOFError as exc:
                raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET)) from exc


def unix_channel(path: str) -> SocketControl:
    """A vTPM at a Unix socket. Raises FrontendError."""
    return SocketControl(partial(_connect_unix, path))


def tcp_channel(host: str, port: int) -> SocketControl:
    """A vTPM at a TCP port. Raises FrontendError."""
    return SocketControl(partial(_connect_tcp, host, port))


def _connect_unix(path: str) -> socket.socket:
    try:
        return connect_unix(path)
    except BlockingIOError:
        raise FrontendError("Could not connect using UnixIO socket.", "it is busy") from None
    except OSError as exc:
        raise FrontendError(f"Connect failed: {exc.strerror}") from exc


def _connect_tcp(host: str, port: int) -> socket.socket:
    try:
        return connect_tcp(host, port)
    except OSError as exc:
        where = f"host '{host}' on port '{port}'"
        reason = f"Could not connect to {where} using TCP socket: {exc.strerror}"
        raise FrontendError(reason) from exc


def _receive(connection: socket.socket, kind: type[WireStruct], until: float) -> WireStruct:
    """One answer: just the result if that is not 0, else all of *kind*."""
    data = receive(connection, PtmResultResponse.SIZE, until)
    # GET_CAPABILITY has no result, but the upper half of its mask is 0 and takes that place.
    failed = PtmResultResponse.unpack_untrusted(data, BIG)
    if failed.result:
        return failed
    data += receive(connection, kind.SIZE - len(data), until)
    answer = kind.unpack_untrusted(data, BIG)
    if isinstance(answer, PtmGetStateResponse | PtmInfoResponse):
        check_size("Answer", answer.length)
        rest = receive(connection, answer.length, until)
        return kind.unpack_untrusted(data + rest, BIG)
    return answer
