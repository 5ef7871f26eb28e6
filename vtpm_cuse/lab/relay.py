"""Between a private TPM and its clients, whatever stack they use: faults, on purpose.

A process of its own, with a thread for each connection: threads of the caller's would wait for ever
where a client in it holds the interpreter's lock while it waits. Each command takes two more turns of
a scheduler.
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import threading
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from vtpm_cuse.client.child import Owned, program_environment, program_words
from vtpm_cuse.client.connect import connect_unix, receive
from vtpm_cuse.errors import LabError, VtpmError
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
_RETRY_SECONDS: Final = 0.1
_ORDER_SECONDS: Final = 120
"""How long the answer to an order may take, the start of the process included."""

_ORDER: Final = struct.Struct("=cId")
_FAIL, _LOSE, _DELAY, _RESET = b"f", b"l", b"d", b"r"


class Relay(Owned):
    """Passes commands and responses on, but for what it is told.

    Args:
        ways: Listening sockets, each with the path of the one that it stands for; they are closed
            here.
        tpm2: Version of the TPM.

    Raises:
        LabError: Of all methods but `release`: it has gone.
        OSError: It cannot be started.
    """

    def __init__(self, ways: Mapping[socket.socket, str], *, tpm2: bool) -> None:
        self._orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._orders.settimeout(_ORDER_SECONDS)
        places = [word for one, path in ways.items() for word in (str(one.fileno()), path)]
        try:
            self._process = subprocess.Popen(  # noqa: S603 - our own program
                [
                    *program_words("vtpm_cuse.lab.relay"),
                    *("2" if tpm2 else "1", str(theirs.fileno()), *places),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env=program_environment(),
                pass_fds=[theirs.fileno(), *(one.fileno() for one in ways)],
                start_new_session=True,
            )
        except BaseException:
            self._orders.close()
            raise
        finally:
            theirs.close()
            for one in ways:
                one.close()
        super().__init__()

    def fail_next(self, code: int) -> None:
        """The next command gets *code*, and never reaches the TPM; those behind it come next."""
        self._order(_FAIL, code=code)

    def lose_next_response(self) -> None:
        """The TPM executes the next command, and then the client's connection ends."""
        self._order(_LOSE)

    def latency(self, seconds: float) -> None:
        """Each command comes so much later."""
        self._order(_DELAY, seconds=seconds)

    def reset(self) -> None:
        """No faults any more."""
        self._order(_RESET)

    def _order(self, kind: bytes, *, code: int = 0, seconds: float = 0.0) -> None:
        order = _ORDER.pack(kind, code, seconds)
        try:
            self._orders.sendall(order)
            if self._orders.recv(len(order)) == order:
                return
        except OSError as exc:
            raise LabError(f"The relay for faults does not answer: {exc}") from exc
        raise LabError("The relay for faults has ended")

    def close(self) -> None:
        """Ends all connections; again is harmless."""
        if self.ours:
            self._process.kill()
            self._process.wait()
        self.release()

    def release(self) -> None:
        """See `Owned`. Once all have let go of its orders, it ends."""
        with suppress(OSError):  # somebody else has closed it
            self._orders.close()
        if not self.ours:
            self._process.returncode = 0  # another process' child


def main() -> int:
    """The relay's own process. Its words: version, socket of orders, then listeners and paths."""
    version, orders, *places = sys.argv[1:]
    serving = _Serving(tpm2=version == "2")
    for fd, path in zip(places[::2], places[1::2], strict=True):
        _thread(serving.accept, socket.socket(fileno=int(fd)), path)
    with socket.socket(fileno=int(orders)) as connection:
        while order := connection.recv(_ORDER.size):
            serving.obey(*_ORDER.unpack(order))
            connection.sendall(order)
    os._exit(0)  # whatever the threads wait for


def _thread(target: object, *arguments: object) -> None:
    threading.Thread(target=target, args=arguments, daemon=True).start()  # type: ignore[arg-type]


class _Serving:
    def __init__(self, *, tpm2: bool) -> None:
        self._tpm2 = tpm2
        self._seconds = 0.0
        self._codes: deque[int] = deque()
        self._losses: deque[int] = deque()
        self._changed = threading.Event()

    def obey(self, kind: bytes, code: int, seconds: float) -> None:
        """An order of `Relay`."""
        if kind == _FAIL:
            self._codes.append(code)
        elif kind == _LOSE:
            self._losses.append(code)
        elif kind == _DELAY:
            self._seconds = seconds
        else:
            self._seconds = 0.0
            self._codes.clear()
            self._losses.clear()
            self._changed.set()  # whoever is late is not any more
            self._changed = threading.Event()

    def accept(self, listener: socket.socket, path: str) -> None:
        """Serves whoever connects, for ever."""
        while True:
            try:
                connection, _ = listener.accept()
                _thread(self._serve, connection, path)
            except (
                OSError,
                RuntimeError,
            ):  # no descriptor or thread is to be had: one may be, soon
                self._changed.wait(_RETRY_SECONDS)

    def _serve(self, connection: socket.socket, path: str) -> None:
        over = suppress(OSError, EOFError, VtpmError)
        with over, connection, connect_unix(path) as tpm:
            tpm.settimeout(None)  # who may give up is the client
            self._converse(connection, tpm)

    def _converse(self, connection: socket.socket, tpm: socket.socket) -> None:
        stream = CommandStream(prefix=self._tpm2)
        data = b"-"
        while data:
            data = connection.recv(_READ_SIZE)
            stream.feed(data)
            while (request := stream.next_request(flush=not data)) is not None:
                if (answer := self._answer(tpm, request)) is None:
                    return
                connection.sendall(framed(answer, request))

    def _answer(self, tpm: socket.socket, request: Request) -> bytes | None:
        """The response; None for one that is lost."""
        if self._seconds:
            self._changed.wait(self._seconds)
        if (code := _next(self._codes)) is not None:
            return response(code, tpm2=self._tpm2)
        loses = _next(self._losses) is not None
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


def _next(waiting: deque[int]) -> int | None:
    """Of several threads, one gets it."""
    try:
        return waiting.popleft()
    except IndexError:
        return None
