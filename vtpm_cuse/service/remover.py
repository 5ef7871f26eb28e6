"""Writes the pid file, and removes it and the sockets in the end.

A process of its own does that where the files are not in the state's folder. Landlock knows rights
of whole folders only, and the folder of a socket may be /run, or somebody's home: whoever serves may
remove nothing there. Nor may he write another number into the pid file, by which others are killed.
He can tell that process when; what it does was settled before.
"""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TYPE_CHECKING, Final, NamedTuple

from vtpm_cuse.acquire.keeper import fork_with_pipes, settle_down
from vtpm_cuse.service.process.pidfile import write_number

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vtpm_cuse.service.process.pidfile import PidFile

_WRITE: Final = b"W"
_REMOVE_SOCKETS: Final = b"S"
_REMOVE_ALL: Final = b"A"
_NUMBER_MAX: Final = 32
_NO_DESCRIPTOR: Final = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}
_HELD: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


class _File(NamedTuple):
    """To be removed if it still is what *held* is: while that is open, its number is no other's.

    A pid file that is yet to come is not held (-1): it is the one that has the server's number. One
    that is yet to be written may have another name until then, *aside*.
    """

    path: str
    held: int
    is_pid_file: bool
    aside: str = ""


class Remover:
    """Removes files at `end`.

    When who serves is killed, the process that there may be removes the sockets all the same. Not a
    pid file: a successor may have begun to write to that very file.

    Args:
        own_folder: The state's, where who serves can do all this himself.
    """

    def __init__(self, own_folder: str | None) -> None:
        self._own_folder = own_folder
        self._near: list[_File] = []
        self._pid_fd = -1
        self._orders = self._answers = -1

    def start(self, sockets: Iterable[str], pid_file: PidFile, *, to_come: bool) -> None:
        """From now on these are this one's to remove, and the pid file to write.

        Args:
            sockets: Paths that are there.
            pid_file: It is open.
            to_come: Somebody else makes and writes it, later on.

        Raises:
            OSError: There is no process, or no descriptor, to be had. `end` removes the files.
        """
        # All of them are this process' to remove, until another one does that.
        files, pid_fd = self._near, pid_file.fd
        _hold_sockets(list(sockets), files)
        if to_come:
            files += [_File(path, -1, is_pid_file=True) for path in pid_file.paths]
            if pid_fd >= 0:
                os.close(pid_fd)
                pid_fd = -1
        else:
            for path in [pid_file.aside] if pid_file.aside else pid_file.paths:
                if (held := _hold(path)) >= 0:
                    files.append(_File(pid_file.paths[0], held, True, pid_file.aside))
        self._pid_fd = pid_fd
        if far := [file for file in files if not self._is_near(file.path)]:
            self._fork(far)
            self._near = [file for file in files if file not in far]

    def _is_near(self, path: str) -> bool:
        if self._own_folder is None:
            return False
        folder = os.path.realpath(self._own_folder)
        return os.path.realpath(os.path.dirname(path)) == folder

    def _fork(self, files: list[_File]) -> None:
        server = os.getpid()
        child, (orders, self._orders, self._answers, answers) = fork_with_pipes(2)
        handed_over = {orders, answers, *(file.held for file in files)}
        if any(file.is_pid_file for file in files):
            handed_over.add(self._pid_fd)
        handed_over.discard(-1)
        if child == 0:
            try:
                settle_down(f"vtpm-remover: clears up after {server}", handed_over)
                _restrict(files)
                _obey(orders, answers, files, self._pid_fd, server)
            finally:
                os._exit(0)
        for fd in handed_over:
            os.close(fd)
        if self._pid_fd in handed_over:
            self._pid_fd = -1

    def write_pid(self) -> None:
        """Puts the process id into the pid file. Raises OSError."""
        if self._pid_fd >= 0:
            _write(self._pid_fd, self._near, os.getpid())
            os.close(self._pid_fd)
            self._pid_fd = -1
        elif number := self._ask(_WRITE):
            raise OSError(number, os.strerror(number))

    def end(self, *, pid_files: bool) -> None:
        """Removes them, and returns when that is done; again is harmless."""
        _remove(self._near, os.getpid(), pid_files=pid_files)
        for file in self._near:
            if file.held >= 0:
                os.close(file.held)
        self._near.clear()
        if self._orders >= 0:
            self._ask(_REMOVE_ALL if pid_files else _REMOVE_SOCKETS)
            os.close(self._orders)
            os.close(self._answers)
            self._orders = self._answers = -1

    def _ask(self, order: bytes) -> int:
        """The number of an error; nobody can tell of any when somebody has killed the process."""
        if self._orders < 0:
            return 0
        try:
            os.write(self._orders, order)
        except BrokenPipeError:
            return 0
        return (os.read(self._answers, 1) or b"\0")[0]


def _obey(orders: int, answers: int, files: list[_File], pid_fd: int, server: int) -> None:
    while True:
        order, error = os.read(orders, 1), 0  # nothing: it has ended
        if order == _WRITE:
            try:
                _write(pid_fd, files, server)
            except OSError as exc:
                error = exc.errno or 0
        else:
            _remove(files, server, pid_files=order == _REMOVE_ALL)
        if not order:
            return
        os.write(answers, bytes([error]))


def _write(fd: int, files: list[_File], server: int) -> None:
    write_number(fd, server)
    for file in files:
        if file.aside:
            os.rename(file.aside, file.path)


def _hold_sockets(paths: list[str], files: list[_File]) -> None:
    try:
        held = [_File(path, _hold(path), is_pid_file=False) for path in paths]
    except OSError:
        for path in paths:  # just made here, and not to be held
            with contextlib.suppress(OSError):
                os.unlink(path)
        raise
    files += [file for file in held if file.held >= 0]


def _hold(path: str) -> int:
    """A descriptor, -1 for what is not there any more. Raises OSError where none is to be had."""
    try:
        return os.open(path, _HELD)
    except OSError as exc:
        if exc.errno in _NO_DESCRIPTOR:
            raise
        return -1


def _restrict(files: list[_File]) -> None:
    from vtpm_cuse.service.confine import capabilities, landlock

    rights = dict.fromkeys((os.path.dirname(file.path) for file in files), landlock.REMOVE_FILE)
    for file in files:
        if file.held < 0:
            rights[os.path.dirname(file.path)] |= landlock.READ_FILE
        if file.aside:
            rights[os.path.dirname(file.path)] |= landlock.MAKE_REG
    with contextlib.suppress(OSError, landlock.LandlockMissing):
        capabilities.drop_capabilities(rights)
        capabilities.gain_nothing()
        landlock.restrict(rights)


def _remove(files: list[_File], server: int, *, pid_files: bool) -> None:
    for file in files:
        paths = [file.path] if file.is_pid_file <= pid_files else []
        for path in filter(None, [*paths, file.aside]):
            with contextlib.suppress(OSError):
                if _is_ours(path, file.held, server):
                    os.unlink(path)


def _is_ours(path: str, held: int, server: int) -> bool:
    if held >= 0:
        return os.path.samestat(os.fstat(held), os.lstat(path))
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return os.read(fd, _NUMBER_MAX) == b"%d" % server
    finally:
        os.close(fd)
