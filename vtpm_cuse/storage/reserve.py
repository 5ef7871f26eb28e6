"""Descriptors kept for the state: a store that fails puts a TPM into failure mode for good.

Clients can use up a process' descriptors by opening connections.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from typing import TYPE_CHECKING, Final, TypeVar

from vtpm_cuse.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

_SPARE: Final = 4  # more than a store has open at a time
_NO_DESCRIPTOR: Final = (errno.EMFILE, errno.ENFILE)


class Reserve:
    """Holds some descriptors, and gives them up for as long as the state needs them.

    One will do for all states of a process: it is one after the other that needs it.

    Args:
        spare: How many.
    """

    def __init__(self, spare: int = _SPARE) -> None:
        self._held: list[int] = []
        self._spare = spare
        self._turn = threading.Lock()
        if not spare:
            return
        with contextlib.suppress(OSError):
            # Of anything that needs no path: from now on it is only duplicated.
            origin, end = os.pipe()
            os.close(end)
            self._held.append(origin)
        self._fill()

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        for fd in self._held:
            close(fd)  # when the interpreter ends, os may have gone already

    def help(self, work: Callable[[], T]) -> T:
        """What *work* returns; it is done again, with room, if descriptors were missing."""
        try:
            return work()
        except StorageError as exc:
            if not self._held or getattr(exc.__cause__, "errno", None) not in _NO_DESCRIPTOR:
                raise
        with self._turn:
            while len(self._held) > 1:
                os.close(self._held.pop())
            try:
                return work()
            finally:
                self._fill()

    def _fill(self) -> None:
        with contextlib.suppress(OSError):
            while 0 < len(self._held) <= self._spare:
                self._held.append(os.dup(self._held[0]))
