"""Messages over a socket, with descriptors, in trio."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Final

import trio

from vtpm_cuse.errors import ChannelError
from vtpm_cuse.fleet.blocking import Ends
from vtpm_cuse.fleet.heritage import SavedChannel

if TYPE_CHECKING:
    from vtpm_cuse.fleet.messages import Message

_CLOSED: Final = "nothing more: the channel was closed"


class Channel(Ends):
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

    def take_foreign(self) -> tuple[int, ...]:
        """As above."""
        if self.fileno() >= 0:
            trio.lowlevel.notify_closing(self._socket)
        return super().take_foreign()

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
