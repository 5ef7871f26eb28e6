"""Which files a state has in its folder, and their modes.

In the sandbox nothing changes the mode of a file any more: there open() gives it, whole. So the umask
of the caller is set aside, and its part done here; files that are there get theirs before.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from typing import TYPE_CHECKING, Final

from vtpm_cuse.storage.base import BACKUP_SUFFIX, BLOB_NAMES, OWNER_MODE, PERMANENT

if TYPE_CHECKING:
    from collections.abc import Mapping

log = logging.getLogger(__name__)

PREFIXES: Final = ("tpm-00", "tpm2-00")
LOCK_NAME: Final = ".lock"
SWAP_SUFFIX: Final = ".tmp"
"""What the refused state is called, here and in the C suite, while it and the backup change places."""
FIRST_SUFFIX: Final = ".new"

_FOLDER_MODE: Final = 0o700
_aside: int | None = None


def set_umask_aside() -> None:
    """From now on a file has the mode that it is made with, and keeps it."""
    global _aside
    before = os.umask(0)
    if _aside is None:
        _aside = before


def of_new(default: int, exact: int | None) -> int:
    """What a new file is made with: *exact*, or *default*, from which the umask is taken."""
    if exact is not None:
        return exact
    return default if _aside is None else default & ~_aside | OWNER_MODE


def to_give(found: os.stat_result, exact: int | None) -> int | None:
    """The mode to change a file's to; None where it is right, or cannot be changed any more.

    It is *exact*; or its owner, if we are that, gets what the umask took.
    """
    mode = stat.S_IMODE(found.st_mode)
    wanted = mode if exact is None else exact
    if exact is None and found.st_uid == os.geteuid():
        wanted |= OWNER_MODE
    return None if wanted == mode or _aside is not None else wanted


def aside_of(file_name: str) -> str:
    """Where the file is written before it gets its name."""
    return file_name.replace("tpm", "TMP", 1)


def file_modes(exact: int | None) -> dict[str, int | None]:
    """Every name that a file of either version has here, and the mode that it is to have."""
    names = [f"{prefix}.{name}" for prefix in PREFIXES for name in BLOB_NAMES]
    permanent = [name for name in names if name.endswith(PERMANENT)]
    names += [name + suffix for name in permanent for suffix in (BACKUP_SUFFIX, SWAP_SUFFIX)]
    names += [aside_of(name) for name in names]
    names += [aside_of(name) + FIRST_SUFFIX for name in permanent]
    return {**dict.fromkeys(names, exact), LOCK_NAME: None}


def give(folder: str, names: Mapping[str, int | None]) -> None:
    """Changes the modes of files that are there, by their names in *folder*; of no link.

    Our own folder, too, is one that its owner can use.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    with contextlib.suppress(OSError):  # what keeps it from being used, its user says
        fd = os.open(folder, flags)
        try:
            _let_us_in(fd)
            for name, exact in names.items():
                _give_file(fd, name, exact)
        finally:
            os.close(fd)


def _let_us_in(fd: int) -> None:
    found = os.fstat(fd)
    mode = stat.S_IMODE(found.st_mode)
    if found.st_uid == os.geteuid() and mode & _FOLDER_MODE != _FOLDER_MODE:
        with contextlib.suppress(OSError):  # a file system that is read-only
            os.fchmod(fd, mode | _FOLDER_MODE)


def _give_file(folder: int, name: str, exact: int | None) -> None:
    try:
        found = os.stat(name, dir_fd=folder, follow_symlinks=False)
        if not stat.S_ISREG(found.st_mode) or to_give(found, exact) is None:
            return
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(name, flags, dir_fd=folder)
        try:
            found = os.fstat(fd)
            mode = to_give(found, exact)
            if stat.S_ISREG(found.st_mode) and mode is not None:
                os.fchmod(fd, mode)
        finally:
            os.close(fd)
    except FileNotFoundError:
        pass
    except OSError as exc:
        log.warning("The mode of %s stays as it is: %s", name, exc.strerror)
