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
import resource
import stat
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

_SMALL: Final = 1 << 20
_AT_EMPTY_PATH: Final = 0x1000  # the descriptor itself
_ABOVE_MODE: Final = 0o755
_OPEN: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_LOOK: Final = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_LINKS_MAX: Final = 40  # as the kernel has it
_MEMORY_DEVICES: Final = 1  # the major number of /dev/null and its like
_OWN_DESCRIPTOR: Final = re.compile(r"/dev/(stdin|stdout|stderr)|(?:/dev|/proc/self)/fd/(\d{1,9})")
_STANDARD: Final = {"stdin": 0, "stdout": 1, "stderr": 2}
_OTHERS_MAY_WRITE: Final = 0o022
_GROUP_MAY_WRITE: Final = 0o020
_INSTEAD: Final = "remove it, or name another"
_NO_ASIDE: Final = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY})
"""Of making or renaming a file, where one that is there may be written in place."""
_NOT_OFFERED: Final = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})
"""What file systems answer that flush by themselves, or cannot, or have no owners and modes: CIFS,
the shared folders of virtual machines, some in user space."""
_NO_FOLDER_FLUSH: Final = _NOT_OFFERED | {errno.EBADF}
"""EBADF: the descriptor was not opened for writing, as no folder's can be."""

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
    with open(open_to_read(path, streams=streams), "rb") as file:
        data = file.read(_SMALL + 1)
    if len(data) > _SMALL:
        raise ValueError(f"it has more than {_SMALL} bytes")
    return data


def open_to_read(path: str, *, streams: bool = False) -> int:
    """Opens a file, and never waits for somebody at its other end.

    Where *streams* are taken, a terminal and /dev/null are as good as a file, and so is what a
    caller has passed, as the shell's <(...) does. A FIFO is not: perhaps nobody ever writes to it.

    Raises:
        OSError: It cannot be opened, or is none of these.
    """
    kinds = _STREAMS if streams else _ONLY_FILES
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        if not streams or (own := _own_descriptor(path)) is None:
            raise
        fd = os.dup(own)  # a socket, or a file of somebody else's
        kinds |= {stat.S_IFSOCK}
    _keep_if(fd, path, kinds)
    return fd


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
        write_all(fd, data)
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


def open_to_write(
    path: str,
    mode: int,
    owner: tuple[int, int] | None = None,
    *,
    append: bool = True,
    truncate: bool = False,
    umask: bool = True,
) -> int:
    """Opens a file, a terminal or /dev/null, and never waits for somebody at its other end.

    Args:
        path: Its last part is no symbolic link.
        mode: Of a new file.
        owner: User and group of a new file, if others than who makes it.
        append: All that is written goes to the end.
        truncate: What is there goes.
        umask: Whether it counts.

    Raises:
        OSError: It cannot be opened, is a link, a pipe or the like, or somebody else has put it
            into a folder as /tmp.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    flags |= os.O_APPEND if append else 0
    folder, name = os.path.split(path)
    if not name:
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    # Held, so that the folder that is looked at is the one that the file is in.
    with _opened(os.open(folder or ".", _LOOK)) as folder_fd:
        try:
            fd = os.open(name, flags | os.O_EXCL, mode, dir_fd=folder_fd)
        except FileExistsError:
            fd = _open_present(folder_fd, name, path, flags & ~os.O_CREAT)
            if truncate and stat.S_ISREG(os.fstat(fd).st_mode):
                os.ftruncate(fd, 0)
            return fd
    if owner is not None:
        set_owner(fd, *owner)
    if not umask:
        set_mode(fd, mode)
    os.set_blocking(fd, True)
    return fd


def write_all(fd: int, data: bytes, offset: int | None = None) -> None:
    """Writes where *fd* is, or from *offset* on, until nothing is left. Raises OSError."""
    rest = memoryview(data)
    while rest:
        done = os.write(fd, rest) if offset is None else os.pwrite(fd, rest, offset)
        rest = rest[done:]
        offset = None if offset is None else offset + done


def flush(fd: int, *, only_data: bool = False) -> None:
    """Puts a file on the disk, where its file system lets a program ask for that.

    Args:
        fd: The file.
        only_data: And its size, but no times.

    Raises:
        OSError: The disk could not take it.
    """
    with _where_offered():
        (os.fdatasync if only_data else os.fsync)(fd)


def set_mode(fd: int, mode: int) -> None:
    """Gives a file that mode, where its file system has modes. Raises OSError."""
    with _where_offered():
        os.fchmod(fd, mode)


def set_owner(fd: int, uid: int, gid: int) -> None:
    """Gives a file to user and group (-1: not), where its file system has owners. Raises OSError."""
    with _where_offered():
        os.fchown(fd, uid, gid)


def flush_folder(fd: int) -> None:
    """Puts the names in a folder on the disk, where its file system lets a program ask for that.

    Raises:
        OSError: The disk could not take them.
    """
    with _where_offered(_NO_FOLDER_FLUSH):
        os.fsync(fd)


def untrusted_part(path: str, *, end: bool = True) -> str | None:
    """What of *path* somebody other than root could change: the file, or a folder on the way.

    Each folder and link is looked at that the kernel passes. None if there is nothing. What is not
    there yet could be made by others in a folder as /tmp.

    Args:
        path: It need not be there.
        end: Whether what it leads to counts, and not only who could have it lead elsewhere.
    """
    pending = [part for part in os.path.abspath(path).split("/") if part][::-1]
    here, links = "/", 0
    while True:
        try:
            found = os.lstat(here)
        except (FileNotFoundError, NotADirectoryError):
            above = os.path.dirname(here)
            return above if others_may_write(above) else None
        except OSError:  # a user's own FUSE mount, say, which not even root may look into
            return here
        is_link = stat.S_ISLNK(found.st_mode)
        if not end and not pending and not is_link:
            return None
        if found.st_uid or _others_may_change(found):
            return here
        if is_link:
            if (links := links + 1) > _LINKS_MAX:
                return here
            target = os.readlink(here)
            here = "/" if target.startswith("/") else os.path.dirname(here)
            pending += [part for part in target.split("/") if part][::-1]
        if not pending:
            return None
        here = os.path.normpath(os.path.join(here, pending.pop()))


def others_may_write(folder: str) -> bool:
    """Whether others than root may make files in a folder, were it as /tmp. False if none is there."""
    try:
        found = os.stat(folder)
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and (found.st_uid != 0 or _has_bits_for_others(found))


def behind_own_links(path: str) -> str:
    """Where a file is that is to be written, by links that only this user or root can have made.

    Raises:
        OSError: Somebody else could have made a link, to have another file written over.
    """
    trusted = {0, os.geteuid()}
    for _ in range(_LINKS_MAX):
        if not os.path.islink(path):
            return path
        folder = os.path.dirname(path) or "."
        above = os.stat(folder)
        if not {os.lstat(path).st_uid, above.st_uid} <= trusted or _others_may_change(above):
            raise OSError(errno.ELOOP, "it is a symbolic link that others can change", path)
        path = os.path.join(folder, os.readlink(path))
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)


def make_folder(
    path: str,
    mode: int,
    owner: tuple[int, int] | None = None,
    *,
    of_folder: bool = False,
    umask: bool = True,
) -> None:
    """Makes a folder where there is none, and those above it.

    What is made is held by a descriptor from then on, for who owns a folder on the way may put
    something else in its place.

    Args:
        path: What is there already stays as it is.
        mode: Of the last one; those above are for all to look at.
        owner: User and group of the last one.
        of_folder: What root makes belongs to whom the folder above does.
        umask: Whether it counts. If so, nobody but their owner may write to any of them.

    Raises:
        OSError: It cannot be made, or something else has come in its place.
    """
    with _umask(counts=umask):
        os.close(_folder(os.path.abspath(path), mode, owner, of_folder=of_folder))


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


def file_limit(least: int, what: str) -> tuple[str, str] | None:
    """Reason and cure, where a limit lets no file have *least* bytes, as *what* takes."""
    most = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if not 0 <= most < least:
        return None
    reason = f"a file may have no more than {most} bytes, too few for {what}"
    return reason, "raise the limit: 'ulimit -f', or LimitFSIZE= of a unit"


def open_end() -> int:
    """A descriptor from which nothing comes, and that leads nowhere: not to a device, as others do."""
    end, other = os.pipe()
    os.close(other)
    return end


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


def _open_present(folder_fd: int, name: str, path: str, flags: int) -> int:
    """A file, a terminal or /dev/null that is there."""
    found = os.stat(name, dir_fd=folder_fd, follow_symlinks=False)
    # Here, for a pipe to be the reason that is given; a link is the kernel's to refuse.
    _refuse(found, path, _LOGS | {stat.S_IFLNK})
    _refuse_put_there(folder_fd, found, path)
    fd = os.open(name, flags, dir_fd=folder_fd)
    _keep_if(fd, path, _LOGS)
    try:
        _refuse_put_there(folder_fd, os.fstat(fd), path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _refuse_put_there(folder_fd: int, found: os.stat_result, path: str) -> None:
    """A file to be written to as it is, which may be another's under a second name."""
    if not stat.S_ISREG(found.st_mode):
        return
    _refuse_strangers(folder_fd, found, path)
    folder = os.fstat(folder_fd)
    if found.st_nlink > 1 and folder.st_mode & _OTHERS_MAY_WRITE & ~_GROUP_MAY_WRITE:
        reason = f"it has another name, in a folder that others write to: {_INSTEAD}"
        raise OSError(errno.EACCES, reason, path)


@contextlib.contextmanager
def _where_offered(numbers: frozenset[int] = _NOT_OFFERED) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        if exc.errno not in numbers:
            raise


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
    return _has_bits_for_others(found)


def _has_bits_for_others(found: os.stat_result) -> bool:
    bits = _OTHERS_MAY_WRITE if found.st_gid else _OTHERS_MAY_WRITE & ~_GROUP_MAY_WRITE
    return bool(found.st_mode & bits)


def _own_descriptor(path: str) -> int | None:
    found = _OWN_DESCRIPTOR.fullmatch(path)
    if found is None:
        return None
    return int(found[2]) if found[2] else _STANDARD[found[1]]


def _keep_if(fd: int, path: str, kinds: frozenset[int], *, fifos: bool = False) -> None:
    """Lets what was opened without waiting be waited for; closes it if it is none of *kinds*."""
    try:
        found = os.fstat(fd)
        _refuse(found, path, kinds)
        if stat.S_ISCHR(found.st_mode) and not _is_terminal_or_memory(fd, found):
            raise OSError(errno.EINVAL, "it is a device", path)
        if stat.S_ISFIFO(found.st_mode) and not fifos and found.st_dev != _device_of_pipes():
            raise OSError(errno.EINVAL, "it is a pipe that nobody may ever write to", path)
        os.set_blocking(fd, True)
    except BaseException:
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
        reason = f"it is somebody else's, in a folder that others write to: {_INSTEAD}"
        raise OSError(errno.EACCES, reason, path)


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
            write_all(fd, data)
            made = os.fstat(fd)
            if owner is not None and (made.st_uid, made.st_gid) != owner:
                set_owner(fd, *owner)
            set_mode(fd, mode)
            flush(fd)
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
        write_all(fd, data)
        os.ftruncate(fd, len(data))
        flush(fd)


def _write_stream(folder_fd: int, name: str, path: str, data: bytes) -> None:
    flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        fd = os.open(name, flags, dir_fd=folder_fd)
    except OSError as exc:
        if exc.errno != errno.ENXIO:
            raise
        raise OSError(errno.ENXIO, "it is a pipe that nobody reads", path) from None
    _keep_if(fd, path, _STREAMS, fifos=True)
    with _opened(fd):
        write_all(fd, data)


def _is_terminal_or_memory(fd: int, found: os.stat_result) -> bool:
    return os.major(found.st_rdev) == _MEMORY_DEVICES or os.isatty(fd)


def _device_of_pipes() -> int:
    """Where pipes without a name are; a FIFO lies in some folder."""
    ends = os.pipe()
    try:
        return os.fstat(ends[0]).st_dev
    finally:
        for end in ends:
            os.close(end)


@contextlib.contextmanager
def _umask(*, counts: bool) -> Iterator[None]:
    """While entered, folders have their mode; if the umask *counts*, less what it takes away.

    Then they can be used by their owner, and written to by nobody else, whatever it is.
    """
    umask = os.umask(0o022)
    os.umask((umask | 0o022) & 0o077 if counts else 0)
    try:
        yield
    finally:
        os.umask(umask)


def _folder(path: str, mode: int, owner: tuple[int, int] | None, *, of_folder: bool) -> int:
    """A descriptor of the folder, which is made if it is not there."""
    with contextlib.suppress(FileNotFoundError):
        return os.open(path, _LOOK)  # links in a path that is there are its owner's wish
    above, name = os.path.split(path)
    with _opened(_folder(above, _ABOVE_MODE, None, of_folder=of_folder)) as parent:
        try:
            os.mkdir(name, mode, dir_fd=parent)
        except FileExistsError:  # by another one, just now
            return os.open(name, _LOOK | os.O_NOFOLLOW, dir_fd=parent)
        fd = os.open(name, _OPEN | os.O_NOFOLLOW, dir_fd=parent)
        try:
            _give_folder(fd, path, _folders_owner(parent) if of_folder else owner)
        except BaseException:
            os.close(fd)
            raise
        return fd


def _give_folder(fd: int, path: str, owner: tuple[int, int] | None) -> None:
    """Hands a folder over that was just made."""
    found = os.fstat(fd)
    if owner is None or owner == (found.st_uid, found.st_gid):
        return
    if found.st_uid != os.geteuid() or os.listdir(fd):
        raise OSError(errno.EEXIST, "Somebody else has put something there", path)
    set_owner(fd, *owner)
