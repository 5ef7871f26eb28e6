"""A process that ends a FUSE mount when its server has ended, however that came about.

The server itself can start no program once it is in its sandbox, and nothing at all once it is
killed. The keeper is forked before it holds any secret, and knows nothing but what to clear up.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import TYPE_CHECKING, Final

from vtpm_cuse.files import open_nowhere

if TYPE_CHECKING:
    from collections.abc import Callable

_NOTE_MAX: Final = 4096
_PR_SET_NAME: Final = 15


class Keeper:
    """Calls *clear_up* in a process of its own, with what `note` was given, after `end` or death.

    Args:
        clear_up: What is to be done.
        keep: Descriptors that it holds until then.
    """

    def __init__(self, clear_up: Callable[[bytes], None], keep: set[int]) -> None:
        child, (read_end, self._note, self._done, done_end) = fork_with_pipes(2)
        if child == 0:
            try:
                settle_down("vtpm-keeper: ends a FUSE mount", keep | {read_end, done_end})
                notes = b""
                while part := os.read(read_end, _NOTE_MAX):
                    notes = (notes + part)[:_NOTE_MAX]
                clear_up(notes.partition(b"\n")[0])
            finally:
                os._exit(0)
        os.close(read_end)
        os.close(done_end)

    def note(self, text: bytes) -> None:
        """What *clear_up* is to know; the first one counts, from before whoever serves may be turned."""
        os.write(self._note, text + b"\n")

    def end(self) -> None:
        """Has it clear up, and waits for that."""
        os.close(self._note)
        os.read(self._done, 1)
        os.close(self._done)


def fork_with_pipes(count: int) -> tuple[int, list[int]]:
    """Like os.fork(), with so many pipes between the two; the ends to read and to write in turn.

    Raises:
        OSError: There is no process, or no descriptor, to be had. Then no pipe is left open: who
            reads from one of them would wait for himself.
    """
    ends: list[int] = []
    try:
        for _ in range(count):
            ends += os.pipe()
        return os.fork(), ends
    except OSError:
        for fd in ends:
            os.close(fd)
        raise


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
    null = open_nowhere()
    for fd in {0, 1, 2} - keep - {null}:
        os.dup2(null, fd)
    _call_itself(title.encode())


def _call_itself(title: bytes) -> None:
    """To ps and pgrep; the second name takes the place of the command line, as far as that goes.

    Where that begins the C library knows; /proc does too, but is not there below another root.
    """
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_NAME, title.partition(b":")[0], 0, 0, 0)
    begin = ctypes.c_void_p.in_dll(libc, "program_invocation_name").value
    words = b"".join(os.fsencode(word) + b"\0" for word in sys.orig_argv)
    if begin is not None and ctypes.string_at(begin, len(words)) == words:
        ctypes.memmove(begin, title[: len(words) - 1].ljust(len(words), b"\0"), len(words))
