"""All descriptors of TPMs that sleep, and who is to wake when something comes on one of them.

One epoll descriptor for all: a task for each would cost more than what sleeps.
"""

from __future__ import annotations

import contextlib
import select
from typing import TYPE_CHECKING, Final, Generic, TypeVar

import trio

if TYPE_CHECKING:
    from collections.abc import Iterable

T = TypeVar("T")

_AT_ONCE: Final = 256
_EVENTS: Final = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLONESHOT


class Sleepers(Generic[T]):
    """Descriptors, and whose they are."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._whose: dict[int, T] = {}

    def watch(self, descriptors: Iterable[int], whose: T) -> None:
        """From now on, what comes on one of them wakes *whose*. Raises OSError."""
        for fd in descriptors:
            self._epoll.register(fd, _EVENTS)
            self._whose[fd] = whose

    def forget(self, descriptors: Iterable[int]) -> None:
        """Before they are closed, or given away; what is not watched is left."""
        for fd in descriptors:
            if self._whose.pop(fd, None) is not None:
                with contextlib.suppress(OSError):
                    self._epoll.unregister(fd)

    async def next(self) -> list[T]:
        """Waits; whom something has come for, once each, until they are watched anew."""
        await trio.lowlevel.wait_readable(self._epoll.fileno())
        found = self._epoll.poll(0, _AT_ONCE)
        return list({id(one): one for fd, _ in found if (one := self._whose.get(fd))}.values())

    def close(self) -> None:
        """Watches nothing any more; the descriptors are their owners'."""
        self._epoll.close()
        self._whose.clear()
