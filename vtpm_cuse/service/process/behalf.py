"""What root opens and makes for the user that it is to be (--runas), before it is that user.

Where somebody else could have a path lead elsewhere, by a link or another folder on the way, root
does it as that user, who then gets nothing that he could not have had himself. Where root alone
decides, as in /run or /var/log, root does it and hands it over.

By effective ids, which are the process' own, of all its threads: none is there yet.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from vtpm_cuse.files import others_may_write, untrusted_part

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vtpm_cuse.config import User

    Owner = tuple[int, int] | None


@contextlib.contextmanager
def making(user: User | None, path: str) -> Iterator[Owner]:
    """While entered, a file is opened or made at *path*; gives who is to own a new one.

    Raises:
        OSError: From within, or this process may not be that user.
    """
    folder = os.path.dirname(os.path.abspath(path))
    part = untrusted_part(folder, end=False) if _is_root_for(user) else None
    if part is None and _is_root_for(user) and others_may_write(folder):
        # There root makes new files only, and uses none of others'.
        part = folder if not _is_roots(folder) or os.path.lexists(path) else None
    with _done(user, part) as owner:
        yield owner


@contextlib.contextmanager
def making_folder(user: User | None, path: str) -> Iterator[Owner]:
    """While entered, a folder is made at *path*; gives who is to own it. Raises OSError."""
    with _done(user, untrusted_part(path) if _is_root_for(user) else None) as owner:
        yield owner


@contextlib.contextmanager
def opening(user: User | None, path: str) -> Iterator[None]:
    """While entered, what is there at *path* is opened, or removed. Raises OSError."""
    with _done(user, untrusted_part(path, end=False) if _is_root_for(user) else None):
        yield


def _is_root_for(user: User | None) -> bool:
    return user is not None and user.uid != 0 and os.geteuid() == 0


def _is_roots(folder: str) -> bool:
    return os.stat(folder).st_uid == 0


@contextlib.contextmanager
def _done(user: User | None, part: str | None) -> Iterator[Owner]:
    """As *user* if *part* of the path is in other hands than root's."""
    if user is None or part is None:
        yield None if user is None else (user.uid, user.gid)
        return
    try:
        with _being(user):
            yield None
    except PermissionError as exc:
        reason = f"{exc.strerror} for user {user.name}: others than root can change {part}"
        raise PermissionError(exc.errno, reason, exc.filename) from exc


@contextlib.contextmanager
def _being(user: User) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        stack.callback(os.setgroups, os.getgroups())
        os.setgroups(user.groups)
        stack.callback(os.setegid, os.getegid())
        os.setegid(user.gid)
        stack.callback(os.seteuid, os.geteuid())
        os.seteuid(user.uid)
        yield
