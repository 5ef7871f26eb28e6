"""A process that ends a FUSE mount when its server has ended, however that came about.

The server itself can start no program once it is in its sandbox, and nothing at all once it is
killed. The keeper is forked before it holds any secret, and knows nothing but what to clear up.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

_NOTE_MAX: Final = 4096
_PR_SET_NAME: Final = 15
_FIRST_STAT_FIELD: Final = 3  # proc(5): the first one behind the name
_STAT_ARGUMENTS: Final = (48, 49)


class Keeper:
    """Calls *clear_up* in a process of its own, with what `note` was given, after `end` or death.

    Args:
        clear_up: What is to be done.
        keep: Descriptors that it holds until then.
    """

    def __init__(self, clear_up: Callable[[bytes], None], keep: set[int]) -> None:
        read_end, self._note = os.pipe()
        self._done, done_end = os.pipe()
        if os.fork() == 0:
            try:
                settle_down("vtpm-keeper: ends a FUSE mount", keep | {read_end, done_end})
                note = b""
                while part := os.read(read_end, _NOTE_MAX):
                    note = part
                clear_up(note)
            finally:
                os._exit(0)
        os.close(read_end)
        os.close(done_end)

    def note(self, text: bytes) -> None:
        """What *clear_up* is to know; the last one counts."""
        os.write(self._note, text)

    def end(self) -> None:
        """Has it clear up, and waits for that."""
        os.close(self._note)
        os.read(self._done, 1)
        os.close(self._done)


def settle_down(title: str, keep: set[int]) -> None:
    """In a new process that outlives the server for a moment: lets go of all of it but *keep*.

    Clients and callers wait for the server's end, and may look for it by its name.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    lowest = 0
    for fd in sorted(keep):
        os.closerange(lowest, fd)
        lowest = fd + 1
    os.closerange(lowest, max(lowest, os.sysconf("SC_OPEN_MAX")))
    with contextlib.suppress(OSError):  # below another root there may be neither
        _open_nowhere(keep)
        _call_itself(title.encode())


def _open_nowhere(keep: set[int]) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for fd in {0, 1, 2} - keep - {null}:
        os.dup2(null, fd)


def _call_itself(title: bytes) -> None:
    """To ps and pgrep; the second name takes the place of the command line, as far as that goes."""
    ctypes.CDLL(None).prctl(_PR_SET_NAME, title.partition(b":")[0], 0, 0, 0)
    with open("/proc/self/stat", encoding="utf-8", errors="replace") as file:
        fields = file.read().rpartition(")")[2].split()
    begin, end = (int(fields[number - _FIRST_STAT_FIELD]) for number in _STAT_ARGUMENTS)
    ctypes.memset(begin, 0, end - begin)
    ctypes.memmove(begin, title, min(len(title), end - begin - 1))
