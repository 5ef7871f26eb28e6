"""A process that removes sockets and pid file in the end, in place of the one that serves.

In its sandbox that one may remove nothing outside the state's folder: Landlock knows rights of whole
folders only, and such a one may be /run, or somebody's home. Who serves can say when; what is
removed was settled before.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Final

from vtpm_cuse.frontends.keeper import settle_down

if TYPE_CHECKING:
    from collections.abc import Iterable

_PID_FILES_TOO: Final = b"P"
_HELD: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


class Remover:
    """Removes files at `end`. There is a process only once `start` has got any.

    When who serves is killed, the sockets go all the same. A pid file does not: a successor may
    have begun to write to that very file.
    """

    def __init__(self) -> None:
        self._orders = self._done = -1

    def start(self, sockets: Iterable[str], pid_files: Iterable[str]) -> None:
        """From now on these files are this one's to remove, as long as they are what they are now."""
        held_sockets, held_pid_files = _hold(sockets), _hold(pid_files)
        held = {**held_sockets, **held_pid_files}
        if not held:
            return
        read_end, self._orders = os.pipe()
        self._done, done_end = os.pipe()
        server = os.getpid()
        if os.fork() == 0:
            try:
                settle_down(
                    f"vtpm-remover: clears up after {server}",
                    {read_end, done_end, *held.values()},
                )
                _restrict({os.path.dirname(path) for path in held})
                order = os.read(read_end, 1)  # or the end
                _remove(held_sockets)
                if order == _PID_FILES_TOO:
                    _remove(held_pid_files)
            finally:
                os._exit(0)
        for fd in (read_end, done_end, *held.values()):
            os.close(fd)

    def end(self, *, pid_files: bool) -> None:
        """Has them removed, and returns when they are; again is harmless."""
        if self._orders < 0:
            return
        if pid_files:
            with contextlib.suppress(OSError):  # somebody has killed it
                os.write(self._orders, _PID_FILES_TOO)
        os.close(self._orders)
        os.read(self._done, 1)
        os.close(self._done)
        self._orders = self._done = -1


def _hold(paths: Iterable[str]) -> dict[str, int]:
    """Descriptors: while one is open, the file's number is no other file's."""
    held = {}
    for path in paths:
        with contextlib.suppress(OSError):
            held[path] = os.open(path, _HELD)
    return held


def _restrict(folders: Iterable[str]) -> None:
    from vtpm_cuse.service import capabilities, landlock

    rights = dict.fromkeys(folders, landlock.REMOVE_FILE)
    with contextlib.suppress(OSError, landlock.LandlockMissing):
        capabilities.drop_capabilities(rights)
        capabilities.gain_nothing()
        landlock.restrict(rights)


def _remove(held: dict[str, int]) -> None:
    for path, fd in held.items():
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(fd), os.lstat(path)):
                os.unlink(path)
