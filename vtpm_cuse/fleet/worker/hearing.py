"""A worker's managers: one, and the next one when that has been killed."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Final

import trio

from vtpm_cuse.errors import ChannelError
from vtpm_cuse.fleet import lines
from vtpm_cuse.fleet.blocking import BlockingChannel
from vtpm_cuse.fleet.channel import Channel
from vtpm_cuse.fleet.messages import Message, Report

if TYPE_CHECKING:
    import socket

_ENDS: Final = 2
"""For orders and for calls."""
_BLANK: Final = b"the manager was killed before it had handed the TPM over"


class Hearing:
    """What a worker hears orders by, and asks for its state.

    The next manager is told what the one before may not have understood: what this worker is now.

    Args:
        end: Of its line; it is closed with it.
    """

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._turn = threading.Lock()
        self._came = self._heard = 0
        self._orders: Channel | None = None
        self._new: Channel | None = None
        self._calls: BlockingChannel | None = None
        self._lasting: list[Message] = []
        self._token: trio.lowlevel.TrioToken | None = None

    async def receive(self) -> Message | None:
        """The next order, of whichever manager; None when there will be none. Cancel it at will."""
        self._token = self._token or trio.lowlevel.current_trio_token()
        while True:
            if self._orders is not None:
                with contextlib.suppress(OSError, ChannelError):
                    if (message := await self._orders.receive()) is not None:
                        return message
            if self._came == self._heard:
                try:
                    await trio.lowlevel.wait_readable(self._end)
                except trio.ClosedResourceError:  # a call may have met the next one
                    continue
            with trio.CancelScope(shield=True):
                if not await self._welcome():
                    return None

    async def _welcome(self) -> bool:
        """Says to the next manager what there is to be said, if there is one."""
        again = self._heard > 0
        if not self._renew(self._heard):
            return False
        if self._orders is not None:
            self._orders.close()
        self._orders, self._heard = self._new, self._came
        blank = Message(Report.READY, _BLANK)
        for message in self._lasting or ([blank] if again else []):
            await self._send(message)
        return True

    async def say(self, message: Message, *, lasts: bool = False) -> None:
        """Tells the manager, and, if it *lasts*, each that comes after him."""
        if lasts:
            self._lasting.append(message)
        await self._send(message)

    async def _send(self, message: Message) -> None:
        with contextlib.suppress(OSError, ChannelError):  # of one who has been killed
            if self._orders is not None:
                await self._orders.send(message)

    def ask(self, message: Message) -> Message | None:
        """What a manager answers, in any thread; None when there is none. Asked again of the next."""
        while True:
            came, calls = self._came, self._calls
            if calls is not None:
                with contextlib.suppress(OSError, ChannelError):
                    calls.send(message)
                    if (answer := calls.receive()) is not None:
                        return answer
            if not self._renew(came):
                return None
            if self._token is not None:  # who waits for him in trio waits in vain
                self._token.run_sync_soon(trio.lowlevel.notify_closing, self._end)

    def _renew(self, came: int) -> bool:
        """Has the channels of a manager behind number *came*; waits for him. False: there is none."""
        with self._turn:
            if self._came > came:
                return True
            if (found := lines.brought(self._end, _ENDS)) is None:
                return False
            orders, calls = found[1]
            if self._calls is not None:
                self._calls.close()
            if self._new is not None and self._new is not self._orders:
                self._new.close()
            self._new, self._calls = Channel(orders), BlockingChannel(calls)
            self._came += 1
        return True

    def close(self) -> None:
        """It is heard no more."""
        for channel in {self._orders, self._new, self._calls} - {None}:
            channel.close()  # type: ignore[union-attr]  # None is taken out
        self._end.close()
