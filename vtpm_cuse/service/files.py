"""Files that a service makes with its caller's rights, for the user it will run as."""

from __future__ import annotations

import os


def open_for(path: str, flags: int, mode: int, owner: tuple[int, int] | None) -> int:
    """Opens a file as os.open() does; if that makes it, it is *owner*'s (user, group)."""
    if owner is None:
        return os.open(path, flags, mode)
    try:
        fd = os.open(path, flags | os.O_EXCL, mode)
    except FileExistsError:
        return os.open(path, flags, mode)
    os.fchown(fd, *owner)
    return fd
