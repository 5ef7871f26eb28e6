"""SIGTERM, SIGINT and SIGHUP end a service in order."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from contextlib import AbstractContextManager


def ending_signals() -> AbstractContextManager[AsyncIterator[int]]:
    """While it is entered, these signals are caught instead of ending the process at once."""
    return trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


async def cancel_at(signals: AsyncIterator[int], scope: trio.CancelScope) -> None:
    """Cancels *scope* at each of the signals."""
    async for _ in signals:
        scope.cancel()
