"""Removes sockets and pid file in the end, by a process of its own where the sandbox takes one.

Landlock knows rights of whole folders only, and the folder of a socket may be /run, or somebody's
home: whoever serves may remove nothing there. It can tell another process when; what is removed was
settled before. Files in the state's own folder take no such process.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Final, NamedTuple

from vtpm_cuse.frontends.keeper import settle_down

if TYPE_CHECKING:
    from collections.abc import Iterable

_PID_FILES_TOO: Final = b"P"
_HELD: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


class _File(NamedTuple):
    """To be removed if it still is what *held* is: while that is open, its number is no other's."""

    path: str
    held: int
    is_pid_file: bool


class Remover:
    """Removes files at `end`.

    When who serves is killed, the process that there may be removes the sockets all the same. Not a
    pid file: a successor may have begun to write to that very file.

    Args:
        own_folder: The state's, where who serves can remove files itself.
    """

    def __init__(self, own_folder: str | None) -> None:
        self._own_folder = own_folder
        self._near: list[_File] = []
        self._orders = self._done = -1

    def start(self, sockets: Iterable[str], pid_files: Iterable[str]) -> None:
        """From now on these are this one's to remove."""
        files = [*_hold(sockets, is_pid_file=False), *_hold(pid_files, is_pid_file=True)]
        self._near = [file for file in files if self._is_near(file.path)]
        if far := [file for file in files if file not in self._near]:
            self._fork(far)

    def _is_near(self, path: str) -> bool:
        if self._own_folder is None:
            return False
        folder = os.path.realpath(self._own_folder)
        return os.path.realpath(os.path.dirname(path)) == folder

    def _fork(self, files: list[_File]) -> None:
        read_end, self._orders = os.pipe()
        self._done, done_end = os.pipe()
        server = os.getpid()
        keep = {read_end, done_end, *(file.held for file in files)}
        if os.fork() == 0:
            try:
                settle_down(f"vtpm-remover: clears up after {server}", keep)
                _restrict({os.path.dirname(file.path) for file in files})
                order = os.read(read_end, 1)  # or the end
                _remove(files, pid_files=order == _PID_FILES_TOO)
            finally:
                os._exit(0)
        for fd in keep:
            os.close(fd)

    def end(self, *, pid_files: bool) -> None:
        """Removes them, and returns when that is done; again is harmless."""
        _remove(self._near, pid_files=pid_files)
        for file in self._near:
            os.close(file.held)
        self._near.clear()
        if self._orders < 0:
            return
        if pid_files:
            with contextlib.suppress(OSError):  # somebody has killed it
                os.write(self._orders, _PID_FILES_TOO)
        os.close(self._orders)
        os.read(self._done, 1)
        os.close(self._done)
        self._orders = self._done = -1


def _hold(paths: Iterable[str], *, is_pid_file: bool) -> list[_File]:
    held = []
    for path in paths:
        with contextlib.suppress(OSError):
            held.append(_File(path, os.open(path, _HELD), is_pid_file))
    return held


def _restrict(folders: set[str]) -> None:
    from vtpm_cuse.service import capabilities, landlock

    rights = dict.fromkeys(folders, landlock.REMOVE_FILE)
    with contextlib.suppress(OSError, landlock.LandlockMissing):
        capabilities.drop_capabilities(rights)
        capabilities.gain_nothing()
        landlock.restrict(rights)


def _remove(files: list[_File], *, pid_files: bool) -> None:
    for path, held, is_pid_file in files:
        if is_pid_file <= pid_files:
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(held), os.lstat(path)):
                    os.unlink(path)
