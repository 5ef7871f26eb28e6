"""Least privilege: what a process may still do once it has acquired what it serves.

No right but those of its user, no new ones, no core dump, no path but the state, no program, no
connection, no other process. All of it before a byte of stored state is read.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import resource
import stat
from typing import TYPE_CHECKING, Final, TypeVar

from vtpm_cuse.errors import FrontendError
from vtpm_cuse.files import open_end
from vtpm_cuse.service.confine import capabilities, landlock, secrecy
from vtpm_cuse.service.confine.seccomp import FILE_SIZE_MAX
from vtpm_cuse.service.process import logs
from vtpm_cuse.storage import modes
from vtpm_cuse.storage.base import DEFAULT_MODE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from vtpm_cuse.config import ProcessConfig, StateConfig
    from vtpm_cuse.service.confine.seccomp import Filter

T = TypeVar("T")

log = logging.getLogger(__name__)

_FILES_MAX: Final = 1024
"""Descriptors: as programs usually have, whatever the caller had. Clients use up no more."""
_SEARCHED_MAX: Final = 1 << 16
_inherited: dict[int, bool] | None = None
"""Of another root: what was open before, and whether a lock is held by it."""
_FILE: Final = landlock.READ_FILE | landlock.WRITE_FILE | landlock.TRUNCATE
_DIRECTORY: Final = _FILE | landlock.READ_DIR | landlock.MAKE_REG | landlock.REMOVE_FILE


def restrict(process: ProcessConfig, state: StateConfig | None) -> None:
    """All of `enter` that those have, too, who are forked from this process: it may still fork.

    Raises:
        FrontendError: The kernel refuses.
    """
    paths = _state_paths(state)
    files = _give_modes(state)
    try:
        if process.seccomp == "kill":  # while what is another user's can still be opened
            _read_nothing()
        secrecy.hide_process()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        capabilities.drop_capabilities([*paths, *files])
        capabilities.gain_nothing()
        if process.seccomp != "kill":  # what is to be found out, or tried, must not be refused
            return
        _close_foreign()
        _limit(resource.RLIMIT_FSIZE, FILE_SIZE_MAX)
        _limit(resource.RLIMIT_NOFILE, _FILES_MAX)
        try:
            landlock.restrict(paths)
        except landlock.LandlockMissing as exc:
            if process.landlock == "require":
                raise FrontendError(
                    f"There is no Landlock: {exc}", "landlock=try serves without it"
                ) from exc
            log.warning("There is no Landlock, so files are not out of this TPM's reach: %s", exc)
    except OSError as exc:
        reason = f"Could not drop privileges: {exc.strerror}"
        raise FrontendError(reason, "--seccomp action=none restricts less") from exc


def _state_paths(state: StateConfig | None) -> dict[str, int]:
    """What a vTPM needs of all paths, with Landlock's rights.

    In a folder these hold for everything below it, so it should be the state's own. A file that
    is not there yet is made, for otherwise its whole folder would have to be open.
    """
    if state is None or not (path := state.location.path):
        return {}
    if state.location.scheme == "dir":
        return {path: _DIRECTORY}
    make_empty(path, DEFAULT_MODE if state.mode is None else state.mode)
    is_foreign = os.path.islink(path) and not _is_block_device(path)
    return {} if is_foreign else {path: _FILE}


def _give_modes(state: StateConfig | None) -> list[str]:
    """The files in a folder that are the state's by their names; all have their modes from here on.

    The rest of what is there is none of its business, and may be what a TPM has made that was taken
    over.
    """
    names: dict[str, int | None] = {}
    location = None if state is None else state.location
    if state is not None and location is not None and location.path:
        if location.scheme == "dir":
            names = modes.file_modes(state.mode)
            modes.give(location.path, names)
        else:
            modes.give(location.folder, {os.path.basename(location.path): state.mode})
    modes.set_umask_aside()
    return [] if location is None else [os.path.join(location.path, name) for name in names]


def make_empty(path: str, mode: int) -> None:
    """Makes an empty file, and sees to it that it stays; whoever opens it says what was wrong."""
    with contextlib.suppress(OSError):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode))
        folder = os.open(os.path.dirname(path), os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _is_block_device(path: str) -> bool:
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except OSError:
        return False


def enter(
    process: ProcessConfig,
    state: StateConfig | None,
    rules: Filter | None,
    start_last: Callable[[], T],
) -> T:
    """The whole sandbox, for good; while this process has but one thread.

    Args:
        process: What is wanted of it.
        state: What stays open to it.
        rules: The filter, which was made before: its library cannot be opened any more.
        start_last: Starts the last thread, if one is to come: it is restricted as this one is.

    Returns:
        What *start_last* does.

    Raises:
        FrontendError: The kernel refuses.
    """
    restrict(process, state)
    return seal(process, rules, start_last)


def seal(process: ProcessConfig, rules: Filter | None, start_last: Callable[[], T]) -> T:
    """The rest of `enter`, of a process that is restricted, or was forked from one that is."""
    started = start_last()
    if process.seccomp == "kill":
        _limit(resource.RLIMIT_NPROC, 0)  # no process and no thread more, for who is not root
    if rules is not None:
        rules.load()
    return started


def no_thread() -> None:
    """For `enter`, of who needs no thread more."""


def _limit(kind: int, most: int) -> None:
    """At most *most*, and no way back."""
    soft, hard = resource.getrlimit(kind)
    limit = min(value for value in (soft, hard, most) if value != resource.RLIM_INFINITY)
    resource.setrlimit(kind, (limit, limit))


def _read_nothing() -> None:
    """Nothing comes from standard input any more, nor from a terminal that messages go to.

    What has been taken over, as the data channel or the log, is left.
    """
    with contextlib.suppress(OSError):
        if os.get_inheritable(0) and 0 not in logs.descriptors():
            end = open_end()
            os.dup2(end, 0)
            os.close(end)
    write_only()


def write_only() -> None:
    """A terminal that messages go to is not read; for who becomes another user, before that."""
    for fd in (1, 2):
        with contextlib.suppress(OSError):
            if os.isatty(fd) and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR:
                flags = os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC
                end = os.open(os.ttyname(fd), flags)
                try:
                    if os.fstat(end).st_rdev == os.fstat(fd).st_rdev and os.isatty(end):
                        os.set_blocking(end, True)
                        os.dup2(end, fd)
                finally:
                    os.close(end)


def note_inherited() -> None:
    """Before there is another root: what /proc shows there, if anything, is somebody else's word."""
    global _inherited
    _inherited = _look_at_inherited()


def _close_foreign() -> None:
    """Closes what the caller left open by accident.

    Only a program's caller gives it descriptors that the next program would inherit too, and those
    that are meant for this one are not so any more once they have been taken over. A file that is
    locked by one is left: the caller may look whether it still is, as libvirt does.
    """
    found = _look_at_inherited() if _inherited is None else _inherited
    for fd, locked in found.items():
        with contextlib.suppress(OSError):
            if not locked and os.get_inheritable(fd):
                os.close(fd)


def _look_at_inherited() -> dict[int, bool]:
    """What the next program would inherit, and whether a lock is held by it."""
    found = {}
    for fd in _open_descriptors():
        if fd > 2:
            with contextlib.suppress(OSError):
                if os.get_inheritable(fd):
                    found[fd] = _holds_lock(fd)
    return found


def _open_descriptors() -> Iterable[int]:
    try:
        return [int(name) for name in os.listdir("/proc/self/fd")]
    except OSError:  # there is no /proc
        return range(min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], _SEARCHED_MAX))


def _holds_lock(fd: int) -> bool:
    """Where nobody can tell, it does not: what stays open is a subverted TPM's to write to."""
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        return False
    with contextlib.suppress(OSError), open(f"/proc/self/fdinfo/{fd}", "rb") as file:
        return any(line.startswith(b"lock:") for line in file)
    return False
