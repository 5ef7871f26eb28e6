"""Messages over a socket, with descriptors: for who may block, and for who may not."""

from __future__ import annotations

import array
import contextlib
import os
import socket
from typing import TYPE_CHECKING, Final

import trio

from vtpm_cuse.errors import ChannelError
from vtpm_cuse.fleet.heritage import SavedChannel
from vtpm_cuse.fleet.messages import Inbox

if TYPE_CHECKING:
    from vtpm_cuse.fleet.messages import Message

_READ_SIZE: Final = 1 << 16
_AT_ONCE: Final = 250
"""Descriptors that come with one byte; the kernel takes 253."""
_CLOSED: Final = "nothing more: the channel was closed"
_ROOM: Final = socket.CMSG_SPACE(_AT_ONCE * array.array("i").itemsize)


class _Ends:
    def __init__(self, end: socket.socket, *, blocking: bool) -> None:
        end.setblocking(blocking)
        self._socket = end
        self._inbox = Inbox()

    def fileno(self) -> int:
        """Of the socket; -1 once it is closed."""
        return self._socket.fileno()

    def close(self) -> None:
        """Closes it, and the descriptors that nobody has taken."""
        self._inbox.close()
        self._socket.close()

    def _receive(self) -> bool:
        """Takes what is there; False at the end. Raises BlockingIOError, OSError."""
        data, ancillary, *_ = self._socket.recvmsg(_READ_SIZE, _ROOM, socket.MSG_CMSG_CLOEXEC)
        descriptors = array.array("i")
        for level, kind, payload in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                descriptors.frombytes(payload[: len(payload) - len(payload) % 4])
        self._inbox.feed(data, descriptors.tolist())
        return bool(data)

    def _send(self, data: memoryview, descriptors: list[int]) -> int:
        """Sends as much as goes; the descriptors that went leave the list. OSError."""
        now = descriptors[:_AT_ONCE]
        more = len(descriptors) > len(now)  # they need a byte each time
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", now))] if now else []
        sent = self._socket.sendmsg([data[:1] if more else data], rights)
        del descriptors[: len(now)]
        return sent


class BlockingChannel(_Ends):
    """For who has nothing else to do meanwhile."""

    def __init__(self, end: socket.socket) -> None:
        super().__init__(end, blocking=True)

    def send(self, message: Message) -> None:
        """Sends all of it. Raises OSError."""
        rest, descriptors = memoryview(message.pack()), list(message.descriptors)
        while rest:
            rest = rest[self._send(rest, descriptors) :]

    def receive(self) -> Message | None:
        """The next message, None at the end. Raises ChannelError, OSError."""
        while (message := self._inbox.next()) is None:
            if not self._receive():
                return None
        return message


class Channel(_Ends):
    """For trio; a `receive` that is cancelled has lost nothing."""

    def __init__(self, end: socket.socket) -> None:
        super().__init__(end, blocking=False)
        self._resting = False

    @classmethod
    def resume(cls, saved: SavedChannel) -> Channel:
        """Goes on where one was suspended. Raises ChannelError, OSError."""
        found = cls(socket.socket(fileno=saved.fd))
        found._inbox.feed(saved.data, list(saved.descriptors))
        return found

    def rest(self) -> None:
        """From now on, `receive` waits for nothing: it is None where nothing whole has come yet."""
        self._resting = True
        if self.fileno() >= 0:
            trio.lowlevel.notify_closing(self._socket)

    def suspend(self) -> SavedChannel:
        """It as plain values; it is not used any more. Nobody may be sending or receiving."""
        data, descriptors = self._inbox.take_all()
        return SavedChannel(self._socket.detach(), data, descriptors)

    def close(self) -> None:
        """As above; who waits for it hears of it."""
        if self.fileno() >= 0:
            trio.lowlevel.notify_closing(self._socket)
        super().close()

    async def send(self, message: Message) -> None:
        """Sends all of it. Raises OSError, ChannelError when the channel is closed meanwhile."""
        rest, descriptors = memoryview(message.pack()), list(message.descriptors)
        while rest:
            try:
                rest = rest[self._send(rest, descriptors) :]
            except BlockingIOError:
                try:
                    await trio.lowlevel.wait_writable(self._socket)
                except trio.ClosedResourceError:
                    if self.fileno() < 0:
                        raise ChannelError(_CLOSED) from None
        await trio.lowlevel.checkpoint()

    async def receive(self) -> Message | None:
        """The next message, None at the end. Raises OSError, ChannelError, also if it is closed."""
        await trio.lowlevel.checkpoint()
        while (message := self._inbox.next()) is None:
            if self._resting:
                return None
            try:
                there = self._receive()
            except BlockingIOError:
                try:
                    await trio.lowlevel.wait_readable(self._socket)
                except trio.ClosedResourceError:
                    if not self._resting:
                        raise ChannelError(_CLOSED) from None
                continue
            except ConnectionResetError:
                there = False
            if not there:
                return None
        return message


def close_all(descriptors: tuple[int, ...]) -> None:
    """Closes them; what is closed already is left."""
    for fd in descriptors:
        with contextlib.suppress(OSError):
            os.close(fd)
