"""What waits for the disk is done in a thread; no signal is ever taken by one.

So those that the manager holds are there for the program that takes its place.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from typing import TYPE_CHECKING, Final, TypeVar

import trio

from vtpm_cuse.fleet.blocking import close_all

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

_CLOSE_SECONDS: Final = 5.0
"""For what nobody has to be asked for."""

log = logging.getLogger(__name__)
_here = threading.local()
"""Has ``deaf`` where this thread takes none any more: to ask the kernel takes longer than a job."""


async def in_thread(job: Callable[[], T]) -> T:
    """Does that; raises what it raises. It cannot be given up."""
    return await trio.to_thread.run_sync(_deaf, job)


async def close_aside(descriptors: tuple[int, ...]) -> threading.Thread | None:
    """Closes what others have opened; the thread that still does so, if that takes long.

    It may be a file in a mount of theirs: then it takes as long as they like, and cannot be ended.
    """
    token, closed = trio.lowlevel.current_trio_token(), trio.Event()

    def close() -> None:
        close_all(descriptors)
        with contextlib.suppress(trio.RunFinishedError):
            token.run_sync_soon(closed.set)

    thread = threading.Thread(target=_deaf, args=(close,), daemon=True)
    try:
        thread.start()
    except RuntimeError:
        log.error(
            "%d descriptors stay open, for there is no thread to close them", len(descriptors)
        )
        return None
    with trio.CancelScope(shield=True), trio.move_on_after(_CLOSE_SECONDS):
        await closed.wait()
    return None if closed.is_set() else thread


def _deaf(job: Callable[[], T]) -> T:
    if not hasattr(_here, "deaf"):
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        _here.deaf = True
    return job()
