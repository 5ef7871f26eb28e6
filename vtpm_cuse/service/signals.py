"""SIGTERM, SIGINT and SIGHUP end a service in order."""

from __future__ import annotations

import contextlib
import signal
from typing import TYPE_CHECKING, Final

import trio

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_ENDING: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@contextlib.contextmanager
def ending_signals(end: Callable[[], None]) -> Iterator[None]:
    """While it is entered, in a trio task, each of these signals calls *end* and does no more.

    trio's own receiver would raise a second signal again at its exit, in the middle of an
    orderly end.
    """
    token = trio.lowlevel.current_trio_token()

    def on_signal(_number: int, _frame: object) -> None:
        with contextlib.suppress(trio.RunFinishedError):
            token.run_sync_soon(end, idempotent=True)

    before = {number: signal.signal(number, on_signal) for number in _ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
