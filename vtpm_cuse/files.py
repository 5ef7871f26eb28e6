"""Files and folders by their names, whatever lies there and whoever may put something there."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

_AT_EMPTY_PATH: Final = 0x1000  # the descriptor itself
_ABOVE_MODE: Final = 0o755
_OPEN: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_LOOK: Final = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_MEMORY_DEVICES: Final = 1  # the major number of /dev/null and its like


def open_plain(path: str, flags: int, mode: int = 0) -> int:
    """Opens a file as os.open() does, but never waits for somebody at its other end.

    A terminal and /dev/null are as good as a file, and so is a pipe that a caller has passed, as
    the shell's <(...) does.

    Raises:
        OSError: It cannot be opened, or is a FIFO or another device.
    """
    try:
        fd = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, mode)
    except OSError as exc:
        if exc.errno == errno.ENXIO:  # a FIFO that nobody reads, a socket, a device without driver
            raise _no_file(path) from exc
        raise
    try:
        if not _is_plain(fd):
            raise _no_file(path)
        os.set_blocking(fd, True)
    except BaseException:
        os.close(fd)
        raise
    return fd


def open_for(path: str, flags: int, mode: int, owner: tuple[int, int] | None) -> int:
    """Opens a file as `open_plain` does; if that makes it, it is *owner*'s (user, group)."""
    if owner is None:
        return open_plain(path, flags, mode)
    try:
        fd = open_plain(path, flags | os.O_EXCL, mode)
    except FileExistsError:
        return open_plain(path, flags, mode)
    os.fchown(fd, *owner)
    return fd


def make_folder(path: str, mode: int, owner: tuple[int, int] | None = None) -> None:
    """Makes a folder where there is none, for *owner* (user, group), and those above it.

    Nobody but their owner may write to any of them. What is made is held by a descriptor from
    then on, for who owns a folder on the way may put something else in its place.

    Raises:
        OSError: It cannot be made, or something else has come in its place.
    """
    with _umask():
        fd, made = _folder(path, mode)
        try:
            if made and owner is not None:
                if os.fstat(fd).st_uid != os.geteuid() or os.listdir(fd):
                    raise OSError(errno.EEXIST, "Somebody else has put something there", path)
                os.fchown(fd, *owner)
        finally:
            os.close(fd)


def check_private(path: str, uid: int) -> None:
    """Refuses a folder that somebody else could have put there.

    Raises:
        OSError: It is not user *uid*'s alone, or the folder that it is in not root's or ours.
    """
    with contextlib.ExitStack() as stack:
        above = os.open(os.path.dirname(path), _LOOK)
        stack.callback(os.close, above)
        fd = os.open(os.path.basename(path), _LOOK | os.O_NOFOLLOW, dir_fd=above)
        stack.callback(os.close, fd)
        for number, owners in ((above, {0, os.geteuid()}), (fd, {uid})):
            found = os.fstat(number)
            if found.st_uid not in owners:
                raise PermissionError(errno.EPERM, f"it belongs to user {found.st_uid}", path)
            if found.st_mode & stat.S_IWOTH:
                raise PermissionError(errno.EPERM, "it can be written to by everybody", path)


def _is_plain(fd: int) -> bool:
    found = os.fstat(fd)
    if stat.S_ISCHR(found.st_mode):
        return os.major(found.st_rdev) == _MEMORY_DEVICES or os.isatty(fd)
    if stat.S_ISFIFO(found.st_mode):
        return found.st_dev == _device_of_pipes()
    return not stat.S_ISBLK(found.st_mode)  # a folder has an error of its own


def _device_of_pipes() -> int:
    """Where pipes without a name are; a FIFO lies in some folder."""
    ends = os.pipe()
    try:
        return os.fstat(ends[0]).st_dev
    finally:
        for end in ends:
            os.close(end)


def _no_file(path: str) -> OSError:
    return OSError(errno.ENXIO, "Neither a file nor a terminal", path)


def give_socket(path: str, uid: int, gid: int) -> None:
    """Changes owner and group (-1: not) of a socket just made there, and of nothing else.

    Raises:
        OSError: It cannot be, or something else has come in its place.
    """
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        ours = stat.S_ISSOCK(found.st_mode) and found.st_uid == os.geteuid()
        if not ours or found.st_nlink != 1:
            raise OSError(errno.EEXIST, "Somebody else has put something there", path)
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.fchownat(fd, b"", ctypes.c_uint(uid), ctypes.c_uint(gid), _AT_EMPTY_PATH):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), path)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _umask() -> Iterator[None]:
    """While entered, what is made can be used by its owner, and written to by nobody else."""
    umask = os.umask(0o022)
    os.umask((umask | 0o022) & 0o077)
    try:
        yield
    finally:
        os.umask(umask)


def _folder(path: str, mode: int) -> tuple[int, bool]:
    """A descriptor of the folder, and whether it has just been made."""
    with contextlib.suppress(FileNotFoundError):
        return os.open(path, _LOOK), False  # links in a path that is there are its owner's wish
    above, name = os.path.split(path)
    parent, _ = _folder(above or ".", _ABOVE_MODE)
    try:
        with contextlib.suppress(FileExistsError):  # by another one, just now
            os.mkdir(name, mode, dir_fd=parent)
            return os.open(name, _OPEN | os.O_NOFOLLOW, dir_fd=parent), True
        return os.open(name, _LOOK | os.O_NOFOLLOW, dir_fd=parent), False
    finally:
        os.close(parent)
