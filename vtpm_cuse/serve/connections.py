"""One connection of a socket server: what has come of it, is in hand, and has yet to go out.

A task may be cancelled at any checkpoint when the server is suspended. So whatever has been read is
either kept here, or answered before the next checkpoint.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import time
from typing import TYPE_CHECKING, Final, Generic, NamedTuple, TypeVar

import trio

from vtpm_cuse.acquire.chardev import CharDevice, ProxyDevice
from vtpm_cuse.proto.control import ControlStream
from vtpm_cuse.proto.places import Place
from vtpm_cuse.proto.stream import CommandStream, MessageStream
from vtpm_cuse.wire.tpm import SendCommandHeader

if TYPE_CHECKING:
    from vtpm_cuse.proto.control import ControlRequest, SavedControlStream
    from vtpm_cuse.proto.places import SavedPlace
    from vtpm_cuse.proto.stream import Request
    from vtpm_cuse.vtpm.vtpm import Vtpm

Stream = TypeVar("Stream", bound=socket.socket | CharDevice)

_READ_SIZE: Final = 16384
LINGER_SECONDS: Final = 50e-6
"""How long somebody looks for the next command, after an answer, before he sleeps."""

_DATA_REST_SECONDS: Final = 1.0
"""How long the rest of a command may take; then the TPM answers to what is there."""

NETWORK: Final = frozenset({socket.AF_INET, socket.AF_INET6})
_ROOM_FOR_ONE: Final = socket.CMSG_LEN(array.array("i").itemsize)
_DEVICES: Final = {"device": CharDevice, "proxy": ProxyDevice}
_NEVER: Final = float("inf")
_NOTHING: Final = memoryview(b"")


class SavedData(NamedTuple):
    """A data connection between two commands, as plain values.

    Attributes:
        fd: Its descriptor.
        kind: What that is: "socket", "device" or "proxy".
        known: Whether it has had an answer, or needs none to stay.
        begun: Bytes of commands that are not cut yet.
        request: A command that has come and is not executed.
        unsent: What is left of the last response.
    """

    fd: int
    kind: str
    known: bool
    begun: bytes
    request: Request | None
    unsent: bytes


class SavedControl(NamedTuple):
    """A control connection between two requests, as plain values.

    Attributes:
        fd: Its descriptor.
        place: Of this connection among the others.
        begun: Bytes of a request that has not come whole.
        waited: Seconds since the first of them, if there are any.
        request: A request that has come and is not executed.
        unsent: What is left of the last response.
        passed: Descriptors that came with a request.
    """

    fd: int
    place: SavedPlace
    begun: SavedControlStream
    waited: float | None
    request: ControlRequest | None
    unsent: bytes
    passed: tuple[int, ...]


class Connection(Generic[Stream]):
    """What both kinds have.

    Attributes:
        connection: Non-blocking.
        unsent: What is left of the last response.
    """

    def __init__(self, connection: Stream) -> None:
        self.connection = connection
        self.unsent = _NOTHING

    async def send(self, data: bytes) -> None:
        """Sends all of it."""
        self.unsent = memoryview(data)
        await self.send_rest()

    async def send_rest(self) -> None:
        """Sends what is unsent."""
        while self.unsent and not self.send_now(self.unsent):
            await trio.lowlevel.wait_writable(self.connection)

    def send_now(self, data: bytes | memoryview) -> bool:
        """Sends what there is room for; whether that was all. The rest is unsent."""
        try:
            sent = self.connection.send(data)
        except BlockingIOError:
            sent = 0
        if sent == len(data):
            self.unsent = _NOTHING
            return True
        self.unsent = memoryview(data)[sent:]
        return False

    @property
    def strict(self) -> bool:
        """Whether the client may be a web browser, as nothing on a Unix socket is."""
        connection = self.connection
        return isinstance(connection, socket.socket) and connection.family in NETWORK


class DataConnection(Connection[socket.socket | CharDevice]):
    """One that TPM commands come on.

    Attributes:
        known: Whether it has had an answer, or needs none to stay.
        request: The command in hand.
        read_size: Bytes to ask for at a time: a whole command, however long.
    """

    def __init__(self, connection: socket.socket | CharDevice, vtpm: Vtpm, *, known: bool) -> None:
        super().__init__(connection)
        self.known = known
        self.read_size = vtpm.buffer_max + SendCommandHeader.SIZE
        self.request: Request | None = None
        whole = isinstance(connection, CharDevice) and connection.messages
        self.stream = (
            MessageStream()
            if whole
            else CommandStream(prefix=vtpm.tpm2, strict=self.strict, largest=vtpm.buffer_max)
        )

    @property
    def at_rest(self) -> bool:
        """Whether nothing of a command or a response is here."""
        return self.stream.empty and self.request is None and not self.unsent

    def take_request(self, *, flush: bool) -> Request | None:
        """The command in hand, else the next, which is then."""
        if self.request is None:
            self.request = self.stream.next_request(flush=flush)
        return self.request

    def suspend(self) -> SavedData:
        """As plain values; the descriptor is the caller's from now on."""
        kinds = (name for name, kind in _DEVICES.items() if type(self.connection) is kind)
        return SavedData(
            self.connection.detach(),
            next(kinds, "socket"),
            self.known,
            self.stream.suspend(),
            self.request,
            bytes(self.unsent),
        )

    @classmethod
    def resumed(cls, saved: SavedData, vtpm: Vtpm) -> DataConnection:
        """As it was suspended."""
        device = _DEVICES.get(saved.kind)
        connection = adopted(saved.fd) if device is None else device(saved.fd)
        found = cls(connection, vtpm, known=saved.known)
        found.stream.resume(saved.begun)
        found.request, found.unsent = saved.request, memoryview(saved.unsent)
        return found

    async def receive(self, *, linger: bool) -> bytes | None:
        """Bytes; none at the end of the stream; None when the rest of a command does not come.

        With *linger*, looks for them a while before it sleeps.
        """
        until = time.perf_counter() + LINGER_SECONDS if linger else 0.0
        rest = _DATA_REST_SECONDS if self.stream.awaits_rest else None
        while True:
            if time.perf_counter() < until:
                os.sched_yield()
            elif not await readable(self.connection, rest):
                return None
            try:
                return self.connection.recv(self.read_size)
            except BlockingIOError:
                continue


class ControlConnection(Connection[socket.socket]):
    """One that control requests come on.

    Attributes:
        place: Of this connection among the others.
        fds: Passed with a request that is not complete yet.
        begun: When the first bytes of it came.
        request: The request in hand.
    """

    def __init__(self, connection: socket.socket, now: float) -> None:
        super().__init__(connection)
        self.place = Place(self.hang_up, now)
        self.fds: list[int] = []
        self.begun = _NEVER
        self.request: ControlRequest | None = None
        self.stream = ControlStream(strict=self.strict)

    def hang_up(self) -> None:
        """Its task finds the end of the stream."""
        hang_up(self.connection)

    @property
    def at_rest(self) -> bool:
        """Whether nothing of a request or a response is here."""
        return not (self.stream.held or self.request or self.unsent or self.fds)

    def suspend(self, now: float) -> SavedControl:
        """As plain values; the descriptors are the caller's from now on."""
        passed = tuple(self.fds)
        self.fds.clear()
        return SavedControl(
            self.connection.detach(),
            self.place.suspend(now),
            self.stream.suspend(),
            None if self.begun == _NEVER else now - self.begun,
            self.request,
            bytes(self.unsent),
            passed,
        )

    @classmethod
    def resumed(cls, saved: SavedControl, now: float) -> ControlConnection:
        """As it was suspended."""
        found = cls(adopted(saved.fd), now)
        found.place.resume(saved.place, now)
        found.stream.resume(saved.begun)
        found.begun = _NEVER if saved.waited is None else now - saved.waited
        found.request, found.unsent = saved.request, memoryview(saved.unsent)
        found.fds = list(saved.passed)
        return found

    async def receive(self) -> bytes:
        """Bytes; of descriptors that came with them the first is kept, if none is.

        There is room for one: the kernel gives out none of the others.
        """
        while True:
            try:
                data, ancillary, *_ = self.connection.recvmsg(
                    _READ_SIZE, _ROOM_FOR_ONE, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self.connection)
                continue
            for level, kind, payload in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    passed = array.array("i")
                    passed.frombytes(payload[: len(payload) - len(payload) % passed.itemsize])
                    self.fds += passed
            self.close_passed(beyond=1)
            return data

    def close_passed(self, *, beyond: int = 0) -> None:
        """Closes passed descriptors, but for the first *beyond*."""
        while len(self.fds) > beyond:
            os.close(self.fds.pop())


def adopted(fd: int) -> socket.socket:
    """The socket that *fd* is."""
    connection = socket.socket(fileno=fd)
    connection.setblocking(False)
    return connection


def at_end(connection: socket.socket | CharDevice) -> bool:
    """Whether the client has gone."""
    try:
        return isinstance(connection, socket.socket) and connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def hang_up(connection: socket.socket | CharDevice) -> None:
    """Its task finds the end of the stream."""
    if isinstance(connection, socket.socket):
        with contextlib.suppress(OSError):  # it has gone itself
            connection.shutdown(socket.SHUT_RDWR)


async def readable(connection: socket.socket | CharDevice, seconds: float | None) -> bool:
    """Waits for bytes or the end; False when *seconds* passed first."""
    if seconds is None:
        await trio.lowlevel.wait_readable(connection)
        return True
    with trio.move_on_after(seconds) as scope:
        await trio.lowlevel.wait_readable(connection)
    return not scope.cancelled_caught
