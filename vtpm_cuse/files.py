"""Files: read without waiting, written whole, by no link and with no one's umask.

What somebody may have put in the way (a link, a pipe, a device) is an error that names it. Only
what the user names on a command line may be a stream: a pipe or a device as `/dev/stdout`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import stat
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

_SMALL: Final = 1 << 20
_AT_EMPTY_PATH: Final = 0x1000  # the descriptor itself
_ABOVE_MODE: Final = 0o755
_OPEN: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_LOOK: Final = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_MEMORY_DEVICES: Final = 1  # the major number of /dev/null and its like
_OWN_DESCRIPTOR: Final = re.compile(r"/dev/(stdin|stdout|stderr)|(?:/dev|/proc/self)/fd/(\d{1,9})")
_STANDARD: Final = {"stdin": 0, "stdout": 1, "stderr": 2}
_OTHERS_MAY_WRITE: Final = 0o022
_GROUP_MAY_WRITE: Final = 0o020
_NO_ASIDE: Final = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY})
"""Of making or renaming a file, where one that is there may be written in place."""
_NO_FLUSH: Final = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF})
"""What file systems answer that flush a folder by themselves, or cannot: CIFS, the shared folders
of virtual machines, some in user space. (EBADF: the descriptor was not opened for writing, as no
folder's can be.)"""

_ONLY_FILES: Final = frozenset({stat.S_IFREG})
_LOGS: Final = _ONLY_FILES | {stat.S_IFCHR}
_STREAMS: Final = _LOGS | {stat.S_IFIFO}
_OTHER_KINDS: Final = {
    stat.S_IFIFO: "is a pipe",
    stat.S_IFCHR: "is a device",
    stat.S_IFBLK: "is a block device",
    stat.S_IFSOCK: "is a socket",
    stat.S_IFLNK: "is a symbolic link",
}


def read_small(path: str, *, streams: bool = False) -> bytes:
    """A file such as a key or certificate; *streams* for what the user named.

    Raises:
        OSError: It cannot be read, or is no file.
        ValueError: It is larger than 1 MiB, or the path can be none.
    """
    with open(_open_to_read(path, streams=streams), "rb") as file:
        data = file.read(_SMALL + 1)
        if not data and stat.S_ISFIFO(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.ENODATA, "it is a pipe that nobody writes to", path)
    if len(data) > _SMALL:
        raise ValueError(f"it has more than {_SMALL} bytes")
    return data


def write_output(
    path: str, data: bytes, mode: int, *, streams: bool = False, of_folder: bool = False
) -> None:
    """Writes a file whole: aside, flushed, renamed. What it replaces hands on owner and mode.

    Where no file can be made or renamed, a mount point say, the one that is there is written in
    place.

    Args:
        path: Its last part is no symbolic link.
        data: All of it.
        mode: Of a new file; the umask does not count.
        streams: A pipe that is read, a device, and ``/dev/stdout`` and its like are written to.
        of_folder: What root makes anew belongs to whom the folder does.

    Raises:
        OSError: It cannot be written; a file that is there is as it was, or, if it could only be
            written in place, as far as that came.
    """
    if streams and (fd := _own_descriptor(path)) is not None:
        _write_all(fd, data)
        return
    folder, name = os.path.split(path)
    if not name:
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    with _opened(os.open(folder or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)) as folder_fd:
        try:
            found = os.stat(name, dir_fd=folder_fd, follow_symlinks=False)
        except FileNotFoundError:
            owner = _folders_owner(folder_fd) if of_folder else None
            _replace(folder_fd, name, data, owner, mode)
            return
        _refuse_strangers(folder_fd, found, path)
        if not stat.S_ISREG(found.st_mode):
            _refuse(found, path, _STREAMS if streams else _ONLY_FILES)
            _write_stream(folder_fd, name, path, data)
            return
        try:
            owner = (found.st_uid, found.st_gid)
            _replace(folder_fd, name, data, owner, stat.S_IMODE(found.st_mode) & 0o777)
        except OSError as exc:
            if exc.errno not in _NO_ASIDE or found.st_nlink != 1:
                raise
            _write_in_place(folder_fd, name, data, found)


def open_log(path: str, mode: int) -> int:
    """Opens a file, or a device, to append to; a new one has *mode*, whatever the umask.

    Raises:
        OSError: It cannot be opened, or is a link, a pipe or the like.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
        os.fchmod(fd, mode)
    except FileExistsError:
        _refuse(os.lstat(path), path, _LOGS)  # here, for a pipe to be the reason that is given
        fd = os.open(path, flags)
        _keep_if(fd, path, _LOGS)
    return fd


def make_folders(path: str, mode: int, *, of_folder: bool = False) -> None:
    """Makes a folder of *mode* and what is missing above it, for all to look at; no umask counts.

    Args:
        path: What is there already stays as it is.
        mode: Of the last one.
        of_folder: What root makes belongs to whom the folder above does.

    Raises:
        OSError: One of them cannot be made.
    """
    path = os.path.abspath(path)
    if os.path.isdir(path):
        return
    above, name = os.path.split(path)
    make_folders(above, 0o755, of_folder=of_folder)
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    with _opened(os.open(above, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)) as above_fd:
        try:
            os.mkdir(name, 0o700, dir_fd=above_fd)
        except FileExistsError:
            if not os.path.isdir(path):
                raise
            return  # somebody was faster
        with _opened(os.open(name, flags, dir_fd=above_fd)) as fd:
            if of_folder and (owner := _folders_owner(above_fd)) is not None:
                os.fchown(fd, *owner)
            os.fchmod(fd, mode)


def flush_folder(fd: int) -> None:
    """Puts the names in a folder on the disk, where its file system lets a program ask for that.

    Raises:
        OSError: The disk could not take them.
    """
    try:
        os.fsync(fd)
    except OSError as exc:
        if exc.errno not in _NO_FLUSH:
            raise


def untrusted_part(path: str) -> str | None:
    """What of *path* somebody other than root could change: the file, or a folder on the way.

    Each folder and link is looked at that the kernel passes. None if there is nothing, or nothing
    there at all.
    """
    pending = [part for part in os.path.abspath(path).split("/") if part][::-1]
    here, links = "/", 0
    while True:
        try:
            found = os.lstat(here)
        except OSError:
            return None
        if found.st_uid or _others_may_change(found):
            return here
        if stat.S_ISLNK(found.st_mode):
            if (links := links + 1) > 40:
                return here
            target = os.readlink(here)
            here = "/" if target.startswith("/") else os.path.dirname(here)
            pending += [part for part in target.split("/") if part][::-1]
        if not pending:
            return None
        here = os.path.normpath(os.path.join(here, pending.pop()))


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


def open_nowhere() -> int:
    """A descriptor, for standard input and output, from which nothing comes and where nothing goes."""
    try:
        return os.open(os.devnull, os.O_RDWR)
    except FileNotFoundError:  # below another root
        import socket

        end, other = socket.socketpair()
        other.close()
        return end.detach()


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


# -- helpers ------------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


def _others_may_change(found: os.stat_result) -> bool:
    """Where the sticky bit is set, they cannot change what is root's there."""
    sticky = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX
    if stat.S_ISLNK(found.st_mode) or sticky:
        return False
    bits = _OTHERS_MAY_WRITE if found.st_gid else _OTHERS_MAY_WRITE & ~_GROUP_MAY_WRITE
    return bool(found.st_mode & bits)


def _own_descriptor(path: str) -> int | None:
    found = _OWN_DESCRIPTOR.fullmatch(path)
    if found is None:
        return None
    return int(found[2]) if found[2] else _STANDARD[found[1]]


def _open_to_read(path: str, *, streams: bool) -> int:
    if streams and (own := _own_descriptor(path)) is not None:
        return os.dup(own)
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    _keep_if(fd, path, _STREAMS if streams else _ONLY_FILES)
    return fd


def _keep_if(fd: int, path: str, kinds: frozenset[int]) -> None:
    """Lets what was opened without waiting be waited for; closes it if it is none of *kinds*."""
    try:
        _refuse(os.fstat(fd), path, kinds)
        os.set_blocking(fd, True)
    except OSError:
        os.close(fd)
        raise


def _refuse(found: os.stat_result, path: str, kinds: frozenset[int]) -> None:
    """Raises OSError for what is none of *kinds*."""
    kind = stat.S_IFMT(found.st_mode)
    if kind == stat.S_IFDIR:
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if kind not in kinds:
        number = errno.ELOOP if kind == stat.S_IFLNK else errno.EINVAL
        raise OSError(number, f"it {_OTHER_KINDS.get(kind, 'is no file')}", path)


def _refuse_strangers(folder_fd: int, found: os.stat_result, path: str) -> None:
    """What the kernel refuses with fs.protected_regular and its like, whatever is set there.

    In a folder such as /tmp somebody may have put it there to get what is written.
    """
    folder = os.fstat(folder_fd)
    shared = folder.st_mode & stat.S_ISVTX and folder.st_mode & _OTHERS_MAY_WRITE
    if shared and found.st_uid not in {os.geteuid(), folder.st_uid}:
        raise OSError(errno.EACCES, "it is somebody else's, in a folder that others write to", path)


def _folders_owner(folder_fd: int) -> tuple[int, int] | None:
    folder = os.fstat(folder_fd)
    return None if os.geteuid() else (folder.st_uid, folder.st_gid)


def _replace(
    folder_fd: int, name: str, data: bytes, owner: tuple[int, int] | None, mode: int
) -> None:
    aside = f".{name}.{os.urandom(8).hex()}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(aside, flags, 0o600, dir_fd=folder_fd)
    try:
        with _opened(fd):
            _write_all(fd, data)
            made = os.fstat(fd)
            if owner is not None and (made.st_uid, made.st_gid) != owner:
                os.fchown(fd, *owner)
            os.fchmod(fd, mode)
            os.fsync(fd)
        os.replace(aside, name, src_dir_fd=folder_fd, dst_dir_fd=folder_fd)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(aside, dir_fd=folder_fd)
        raise
    _flush_folder(folder_fd)


def _flush_folder(folder_fd: int) -> None:
    try:
        fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=folder_fd)
    except PermissionError:  # a folder that may be written to and not be listed
        return
    with _opened(fd):
        flush_folder(fd)


def _write_in_place(folder_fd: int, name: str, data: bytes, found: os.stat_result) -> None:
    """Over the old content, cut at the end: at no time is the file empty."""
    flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with _opened(os.open(name, flags, dir_fd=folder_fd)) as fd:
        if not os.path.samestat(os.fstat(fd), found):
            raise OSError(errno.EBUSY, "it was replaced meanwhile", name)
        _write_all(fd, data)
        os.ftruncate(fd, len(data))
        os.fsync(fd)


def _write_stream(folder_fd: int, name: str, path: str, data: bytes) -> None:
    flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        fd = os.open(name, flags, dir_fd=folder_fd)
    except OSError as exc:
        if exc.errno != errno.ENXIO:
            raise
        raise OSError(errno.ENXIO, "it is a pipe that nobody reads", path) from None
    _keep_if(fd, path, _STREAMS)
    with _opened(fd):
        _write_all(fd, data)


def _write_all(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


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
