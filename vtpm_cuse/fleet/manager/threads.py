"""What waits for the disk is done in a thread; no signal is ever taken by one.

So those that the manager holds are there for the program that takes its place.
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, TypeVar

import trio

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


async def in_thread(job: Callable[[], T]) -> T:
    """Does that; raises what it raises. It cannot be given up."""
    return await trio.to_thread.run_sync(_deaf, job)


def _deaf(job: Callable[[], T]) -> T:
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    return job()
