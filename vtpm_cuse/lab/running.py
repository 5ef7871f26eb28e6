"""The private TPMs that a program has announced to others of its user: how, and how they find them.

A file in the TPM's folder says what there is. Whoever announced it holds a lock on that file, which
ends with the process, so nobody takes what a crash has left for a TPM.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import stat
from typing import TYPE_CHECKING, Final, NamedTuple

from vtpm_cuse.client.child import ANNOUNCEMENT, nest_places
from vtpm_cuse.errors import LabError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

_FOLDER: Final = re.compile(r"vtpm-[0-9a-f]{16}")
_NAME: Final = re.compile(r"(?=.*[A-Za-z_])[A-Za-z0-9_][A-Za-z0-9._-]{0,63}|[0-9]{1,10}")
_VARIABLE: Final = re.compile(r"(VTPM|TSS2|TPM|TPM2|TPM2[A-Z0-9]+)_[A-Z0-9_]{1,64}|TCTI")
_SIZE_MAX: Final = 1 << 16
_OPENING: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_OTHERS: Final = 0o077


class Running(NamedTuple):
    """A TPM that runs.

    Attributes:
        name: What it is called; several may have one name.
        version: "2.0" or "1.2".
        pid: Whoever it belongs to; nobody if that is a manager, which outlives its processes.
        env: The environment variables by which clients find it.
    """

    name: str
    version: str
    pid: int | None
    env: dict[str, str]


def is_name(text: str) -> bool:
    """Whether a TPM may be called so; digits alone are process ids."""
    return _NAME.fullmatch(text) is not None and not text.isdigit()


def announce(folder: str, name: str, version: str, env: Mapping[str, str]) -> int:
    """Lets this user's other programs find a TPM, as long as this process runs.

    Args:
        folder: The TPM's.
        name: What it is called, see `is_name`; "" for this process' id.
        version: "2.0" or "1.2".
        env: What others are to set.

    Returns:
        A descriptor, which the caller keeps open for so long.

    Raises:
        LabError: The file cannot be written.
    """
    pid = os.getpid()
    path = f"{folder}/{ANNOUNCEMENT}"
    text = json.dumps(Running(name or str(pid), version, pid, dict(env))._asdict())
    fd = -1
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.fchmod(fd, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX)
        if os.write(fd, data := text.encode(errors="surrogateescape")) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as exc:
        if fd >= 0:
            os.close(fd)
        raise LabError(f"Could not write {path}: {exc.strerror}") from exc
    return fd


def running() -> list[Running]:
    """All that run, of this user's, by their names."""
    found = []
    for place in dict.fromkeys(map(os.path.realpath, nest_places())):
        with contextlib.suppress(OSError):
            folders = [name for name in os.listdir(place) if _FOLDER.fullmatch(name)]
            found += [one for name in folders if (one := _read_untrusted(f"{place}/{name}"))]
    return sorted(found)


def _read_untrusted(folder: str) -> Running | None:
    """What is announced in it; None for all that is not a live announcement of this user's."""
    with contextlib.suppress(OSError), _opened(folder, None) as place:
        if not _is_private(place, stat.S_ISDIR):
            return None
        with _opened(ANNOUNCEMENT, place) as fd:
            if _is_private(fd, stat.S_ISREG) and _is_locked(fd):
                return parse_untrusted(os.read(fd, _SIZE_MAX))
    return None


@contextlib.contextmanager
def _opened(path: str, folder: int | None) -> Iterator[int]:
    fd = os.open(path, _OPENING, dir_fd=folder)
    try:
        yield fd
    finally:
        os.close(fd)


def _is_private(fd: int, is_kind: Callable[[int], bool]) -> bool:
    found = os.fstat(fd)
    mine = found.st_uid == os.geteuid() and not found.st_mode & _OTHERS
    return mine and is_kind(found.st_mode)


def _is_locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def parse_untrusted(data: bytes) -> Running | None:
    """An announcement; None for anything that `announce` would not have written."""
    try:
        given = json.loads(data)
        found = Running(**given)
        good = (
            _NAME.fullmatch(found.name) is not None
            and found.version in {"2.0", "1.2"}
            and type(found.pid) is int
            and all(map(_is_variable, found.env.items()))
        )
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None
    return found if good else None


def _is_variable(item: tuple[str, str]) -> bool:
    name, value = item
    return _VARIABLE.fullmatch(name) is not None and value.isprintable()
