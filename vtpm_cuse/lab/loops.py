"""Blocking calls from a coroutine, under trio or asyncio, neither of which is imported for it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

R = TypeVar("R")


async def in_thread(call: Callable[[], R], undo: Callable[[R], object] | None = None) -> R:
    """What *call* gives, in a thread of the loop's; a loop that runs has been imported.

    A call is always made and finished. Where a cancellation then takes its result away, as asyncio's
    does, that is given to *undo*.
    """
    trio = sys.modules.get("trio")
    if trio is not None and _in_trio(trio):
        with trio.CancelScope(shield=True):  # whoever is cancelled hears of it right behind this
            found: R = await trio.to_thread.run_sync(call)
        return found
    asyncio: Any = sys.modules["asyncio"]
    running = asyncio.get_running_loop().run_in_executor(None, call)
    try:
        found = await asyncio.shield(running)
    except asyncio.CancelledError:
        while not running.done():
            try:
                await asyncio.shield(running)
            except asyncio.CancelledError:
                continue
            except Exception:  # who is cancelled does not hear of it
                break
        if undo is not None and not running.cancelled() and running.exception() is None:
            undo(running.result())
        raise
    return found


# Any: a module.
def _in_trio(trio: Any) -> bool:  # noqa: ANN401
    try:
        trio.lowlevel.current_task()
    except RuntimeError:
        return False
    return True
