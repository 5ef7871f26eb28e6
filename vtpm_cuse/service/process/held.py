"""Signals that come while a service starts wait until it can end in order.

From the first file that is made on, death by a signal would leave things behind; and an exception
would be lost where Python happens to be in an import.
"""

from __future__ import annotations

import signal
from typing import Final

_ENDING: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def ending_signals_heard() -> list[signal.Signals]:
    """Those that end a service; not those that it was started with ignored."""
    return [number for number in _ENDING if signal.getsignal(number) is not signal.SIG_IGN]


class HeldSignals:
    """They wait from now on, in this thread and all that it starts, until `release`.

    Args:
        already: The program waited with them whose place this one has taken (execve keeps that).
    """

    def __init__(self, *, already: bool = False) -> None:
        self._before: set[int] = set()
        self.hold()
        if already:
            self._before -= set(ending_signals_heard())

    def hold(self) -> None:
        """They wait again."""
        self._before = set(signal.pthread_sigmask(signal.SIG_BLOCK, ending_signals_heard()))

    def release(self) -> None:
        """Those that came meanwhile come now; again is harmless."""
        signal.pthread_sigmask(signal.SIG_SETMASK, self._before)
