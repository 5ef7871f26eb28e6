"""A process that ends a FUSE mount when its server has ended, however that came about.

The server itself can start no program once it is in its sandbox, and nothing at all once it is
killed. The keeper is forked before it holds any secret, and knows nothing but what to clear up.
"""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_NOTE_MAX = 4096


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
                _be_quiet(keep | {read_end, done_end})
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


def _be_quiet(keep: set[int]) -> None:
    """Lets go of everything of the server's but *keep*: clients and callers wait for its end."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) not in keep:
            with contextlib.suppress(OSError):
                os.close(int(name))
