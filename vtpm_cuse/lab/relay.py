"""Between a private TPM and its clients, whatever stack they use: faults, on purpose.

Threads of this process, one for each connection. So each command takes two more turns of a scheduler,
and a client in this very process that holds the interpreter's lock while it waits would wait for ever.
"""

from __future__ import annotations

import socket
import threading
from collections import deque
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final

from vtpm_cuse.client.child import Owned
from vtpm_cuse.client.connect import connect_unix, receive
from vtpm_cuse.errors import VtpmError
from vtpm_cuse.proto.stream import CommandStream, framed
from vtpm_cuse.wire.layout import BIG
from vtpm_cuse.wire.tpm import (
    TPM_HEADER_SIZE,
    TPM_SEND_COMMAND,
    SendCommandHeader,
    command_size,
    response,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vtpm_cuse.proto.stream import Request

_READ_SIZE: Final = 1 << 14
_FRAME: Final = 4  # bytes before, and behind, a response to a command with a prefix


class Relay(Owned):
    """Passes commands and responses on, but for what it is told.

    Args:
        ways: Listening sockets, each with the path of the one that it stands for; its from now on.
        tpm2: Version of the TPM.
        seconds: How long it waits for a response.

    Attributes:
        latency: Seconds by which each command comes later.
    """

    def __init__(self, ways: Mapping[socket.socket, str], *, tpm2: bool, seconds: float) -> None:
        self.latency = 0.0
        self._tpm2, self._seconds = tpm2, seconds
        self._codes: deque[int] = deque()
        self._losses: deque[None] = deque()
        self._over = threading.Event()
        self._sockets = set(ways)
        self._threads: set[threading.Thread] = set()
        super().__init__()
        for listener, path in ways.items():
            self._start(partial(self._accept, listener, path))

    def fail_next(self, code: int) -> None:
        """The next command gets *code*, and never reaches the TPM; those behind it come next."""
        self._codes.append(code)

    def lose_next_response(self) -> None:
        """The TPM executes the next command, and then the client's connection ends."""
        self._losses.append(None)

    def reset(self) -> None:
        """No faults any more."""
        self.latency = 0.0
        self._codes.clear()
        self._losses.clear()

    def close(self) -> None:
        """Ends all connections."""
        self._over.set()
        for one in list(self._sockets):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        for thread in list(self._threads):
            thread.join()

    def release(self) -> None:
        """See `Owned`; for a copy, in which there are no threads."""
        for one in list(self._sockets):
            one.close()

    def _start(self, target: partial[None]) -> None:
        def run() -> None:
            try:
                target()
            finally:
                self._threads.discard(thread)

        thread = threading.Thread(target=run, name="vtpm-lab-relay", daemon=True)
        self._threads.add(thread)
        thread.start()

    def _accept(self, listener: socket.socket, path: str) -> None:
        with listener:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:  # it was shut down
                    if self._over.is_set():
                        break
                    self._over.wait(0.1)  # no descriptor is to be had: one may be, soon
                    continue
                self._sockets.add(connection)
                self._start(partial(self._serve, connection, path))
        self._sockets.discard(listener)

    def _serve(self, connection: socket.socket, path: str) -> None:
        over = suppress(OSError, EOFError, VtpmError)
        with over, connection, connect_unix(path) as tpm:
            tpm.settimeout(self._seconds)
            self._sockets.add(tpm)
            try:
                self._converse(connection, tpm)
            finally:
                self._sockets.discard(tpm)
        self._sockets.discard(connection)

    def _converse(self, connection: socket.socket, tpm: socket.socket) -> None:
        stream = CommandStream(prefix=self._tpm2)
        data = b"-"
        while data and not self._over.is_set():
            data = connection.recv(_READ_SIZE)
            stream.feed(data)
            while (request := stream.next_request(flush=not data)) is not None:
                if (answer := self._answer(tpm, request)) is None:
                    return
                connection.sendall(framed(answer, request))

    def _answer(self, tpm: socket.socket, request: Request) -> bytes | None:
        """The response; None for one that is lost."""
        if self.latency:
            self._over.wait(self.latency)
        if (code := _next(self._codes)) is not None:
            return response(code, tpm2=self._tpm2)
        loses = bool(self._losses)
        if loses:
            _next(self._losses)
        command = request.command
        if request.locality is not None:
            prefix = SendCommandHeader(TPM_SEND_COMMAND, request.locality, len(command))
            tpm.sendall(prefix.pack(BIG) + command)
            receive(tpm, _FRAME)
        else:
            tpm.sendall(command)
        head = receive(tpm, TPM_HEADER_SIZE)
        answer = head + receive(tpm, command_size(head) - TPM_HEADER_SIZE)
        if request.locality is not None:
            receive(tpm, _FRAME)
        return None if loses else answer


def _next(codes: deque[int] | deque[None]) -> int | None:
    try:
        return codes.popleft()
    except IndexError:
        return None
