"""Files that are whole or not there: keys, certificates, serial numbers, saved state."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import TYPE_CHECKING, Final

from vtpm_cuse.files import flush_folder

if TYPE_CHECKING:
    from pathlib import Path


_SMALL: Final = 1 << 20


def read_small(path: str) -> bytes:
    """A file such as a key or certificate. Raises OSError, and ValueError beyond 1 MiB."""
    with open(path, "rb") as file:
        data = file.read(_SMALL + 1)
    if len(data) > _SMALL:
        raise ValueError(f"it has more than {_SMALL} bytes")
    return data


def replace_file(path: str | Path, data: bytes, mode: int) -> None:
    """Writes aside, flushes, renames, flushes the folder. *mode* is less the umask.

    Raises:
        OSError: The file at *path* is as it was.
    """
    folder, name = os.path.split(os.fspath(path))
    folder_fd = os.open(folder or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    aside = f".{name}.{os.urandom(8).hex()}"
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(aside, flags, mode, dir_fd=folder_fd)
        try:
            with open(fd, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, name, src_dir_fd=folder_fd, dst_dir_fd=folder_fd)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(aside, dir_fd=folder_fd)
            raise
        flush_folder(folder_fd)
    finally:
        os.close(folder_fd)


def write_output(path: str, data: bytes, mode: int) -> None:
    """Replaces a file, or writes into what is no regular file, a pipe say.

    Raises:
        OSError: It cannot be written, or is a symbolic link.
    """
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        replace_file(path, data, mode)
        return
    if stat.S_ISLNK(found.st_mode):
        raise OSError(errno.ELOOP, "is a symbolic link", path)
    if stat.S_ISREG(found.st_mode):
        replace_file(path, data, mode)
        return
    with open(path, "wb") as file:
        file.write(data)
