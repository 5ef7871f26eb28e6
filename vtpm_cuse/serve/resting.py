"""Connections that rest between two commands, and the one reader of all of them.

A connection is read here while it rests, and by its own task else: never by both. `Resting.look`
runs from its beginning to its end without a checkpoint, whoever calls it, so there is one reader at
a time. What is there to be waited for, the rest of a command say, the reader leaves to the
connection's own task.
"""

from __future__ import annotations

import os
import select
import time
from typing import TYPE_CHECKING, Final

import trio

from vtpm_cuse.serve.connections import LINGER_SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable

_AT_ONCE: Final = 32
"""Commands between two checkpoints."""


class _Guest:
    def __init__(self, read: Callable[[], bool | None]) -> None:
        self.read = read
        self.left = trio.Event()
        self.error: Exception | None = None


class Resting:
    """Those that rest.

    Args:
        epoll: For them alone. It may have to be made before the sandbox, which allows no more.
    """

    def __init__(self, epoll: select.epoll) -> None:
        self._epoll = epoll
        self._guests: dict[int, _Guest] = {}

    async def rest(self, fd: int, read: Callable[[], bool | None], *, linger: bool) -> None:
        """Has *read* called when something has come on *fd*, again and again until it says False.

        Args:
            fd: Of a connection that nobody else reads meanwhile.
            read: Reads once, without waiting, and answers what has come, if it has: else it gives
                None. It says whether the connection rests on; what it raises, this raises.
            linger: An answer has just been given.
        """
        self._epoll.register(fd, select.EPOLLIN)
        guest = self._guests[fd] = _Guest(read)
        try:
            if linger:
                self.look()
            await guest.left.wait()
        finally:
            self._let_go(fd, guest)
        if guest.error is not None:
            raise guest.error

    async def read_all(self) -> None:
        """Waits for all that comes, for ever."""
        while True:
            await trio.lowlevel.wait_readable(self._epoll.fileno())
            self.look(until=0.0)

    def look(self, until: float | None = None) -> None:
        """Reads what comes, each connection once in turn, until nothing has come for a while.

        Args:
            until: How long that is at first, by `time.perf_counter`; a while if it is None.
        """
        poll, now, guests = self._epoll.poll, time.perf_counter, self._guests
        if until is None:
            until = now() + LINGER_SECONDS
        alone = tuple(guests.items()) if len(guests) == 1 else ()  # asked without a poll
        left = _AT_ONCE
        while left > 0:
            answered = False
            for fd, guest in alone or [(fd, guests[fd]) for fd, _ in poll(0, _AT_ONCE)]:
                try:
                    rests = guest.read()
                except Exception as exc:  # its own task says what it costs
                    guest.error, rests = exc, False
                if rests is None:
                    continue
                left -= 1
                answered = True
                if not rests:
                    self._let_go(fd, guest)
                    left = 0  # to those who have to see to it
            if answered:
                until = now() + LINGER_SECONDS
            elif now() < until:
                os.sched_yield()
            else:
                return

    def _let_go(self, fd: int, guest: _Guest) -> None:
        if not guest.left.is_set():
            guest.left.set()
            del self._guests[fd]
            self._epoll.unregister(fd)
