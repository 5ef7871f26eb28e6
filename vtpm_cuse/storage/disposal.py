"""Frees replaced files beside the work, for some file systems take long for it.

A file that has lost its last name lives on while a descriptor is open, and is
freed when that one closes. Where this takes about a millisecond, much more
than all the rest of a write, another thread does it: no answer waits for it.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vtpm_cuse.storage.base import RunLater

_LONG_SECONDS: Final = 200e-6
"""Between what it takes where files are freed at once and the millisecond where they are not."""
_WAITING_MAX: Final = 64
"""Files: a bound for what a busy thread can keep of descriptors and disk."""


class Disposal:
    """Lets files outlive their names, once the loss of one has taken long.

    Attributes:
        run_later: Where to run what need not be done now; None while there is no such place.
    """

    def __init__(self) -> None:
        self.run_later: RunLater | None = None
        self._worthwhile = False
        self._waiting: list[int] = []  # most of many stores never have one
        self._closing = threading.Lock()

    @contextlib.contextmanager
    def freed_later(self, directory: int, *names: str) -> Iterator[None]:
        """Within, files of these names may lose them; what they take on the disk is free later."""
        held = []
        if self._worthwhile and self.run_later is not None:
            flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
            for name in names:
                with contextlib.suppress(OSError):  # there is none; or it is freed within
                    held.append(os.open(name, flags, dir_fd=directory))
        begun = time.perf_counter()
        try:
            yield
        finally:
            if not held and time.perf_counter() - begun > _LONG_SECONDS:
                self._worthwhile = True
            for fd in held:
                self._waiting.append(fd)
                self._leave()

    def catch_up(self) -> None:
        """Frees all that waits."""
        while self._free_one():
            pass

    def _leave(self) -> None:
        if self.run_later is None or len(self._waiting) > _WAITING_MAX:
            self._free_one()
        else:
            self.run_later(self._free_one)

    def _free_one(self) -> bool:
        """Whether there was one. The lock: who finds none may rely on all being free."""
        with self._closing:
            try:
                fd = self._waiting.pop(0)
            except IndexError:
                return False
            with contextlib.suppress(OSError):  # the kernel closes it, whatever it says
                os.close(fd)
            return True
