"""SIGTERM, SIGINT and SIGHUP end a service in order.

Not those that it was started with ignored: nohup and a shell's "&" mean it.
"""

from __future__ import annotations

import contextlib
import signal
from typing import TYPE_CHECKING

import trio

from vtpm_cuse.service.process.held import ending_signals_heard

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


@contextlib.contextmanager
def ending_signals(end: Callable[[], None], release: Callable[[], None]) -> Iterator[Sequence[int]]:
    """While it is entered, in a trio task, the first of these signals calls *end*; gives who came.

    All others, and those that come afterwards, are ignored: the process is about to end, with
    a status of its own. trio's own receiver would raise a second signal again at its exit, in
    the middle of an orderly end. *release* lets those come that have waited until now; *end* is
    called before anything else then. Where they are held when it is left, who comes next has them.
    """
    token = trio.lowlevel.current_trio_token()

    ending = ending_signals_heard()
    came: list[int] = []

    def handle(handler: Callable[[int, object], None] | signal.Handlers) -> None:
        for number in ending:
            signal.signal(number, handler)

    def on_signal(number: int, _frame: object) -> None:
        handle(signal.SIG_IGN)
        came.append(number)
        token.run_sync_soon(end, idempotent=True)

    handle(on_signal)
    release()
    if came:
        end()
    try:
        yield came
    finally:
        held = signal.pthread_sigmask(signal.SIG_BLOCK, ()).issuperset(ending)
        handle(signal.SIG_DFL if held and not came else signal.SIG_IGN)


@contextlib.contextmanager
def renewing_signal(begin_anew: Callable[[], None]) -> Iterator[None]:
    """While it is entered, in a trio task, SIGUSR2 calls *begin_anew*; else it does nothing."""
    token = trio.lowlevel.current_trio_token()
    signal.signal(signal.SIGUSR2, lambda *_: token.run_sync_soon(begin_anew, idempotent=True))
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
