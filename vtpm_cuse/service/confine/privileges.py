"""Which user serves, below which root: --runas and --chroot.

Messages are the C suite's.
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, Final

from vtpm_cuse.config import User
from vtpm_cuse.errors import UsageError

if TYPE_CHECKING:
    from vtpm_cuse.config import Exits

_UID_MAX: Final = 0xFFFF_FFFE  # all ones means "leave it" to the kernel
_UID_DIGITS_MAX: Final = 1000  # int() has a limit of its own, and an error for it


@functools.cache
def find_user(text: str) -> User:
    """The user of a name, with all of its groups, or of a number, whose group has that number too.

    Looked up once: later on, /etc may be somebody else's, below another root.

    Raises:
        UsageError: There is none.
    """
    if text.removeprefix("-").isdecimal() and text.isascii():
        if len(text) > _UID_DIGITS_MAX or not 0 <= (uid := int(text)) <= _UID_MAX:
            raise UsageError(f"Error: uid {text[:40]} outside valid range.")
        return User(text, uid, uid, (uid,))
    import pwd

    try:
        found = pwd.getpwnam(text)
    except KeyError:
        raise UsageError(f"Error: User '{text}' does not exist.") from None
    return User(text, found.pw_uid, found.pw_gid, tuple(os.getgrouplist(text, found.pw_gid)))


def become(user: User | None, exits: Exits) -> None:
    """Is *user* from now on, for good.

    Raises:
        UsageError: This process may not.
    """
    if user is None:
        return
    if (os.getuid(), os.geteuid(), os.getegid()) == (user.uid, user.uid, user.gid) != (0, 0, 0):
        return  # PEER: fails
    try:
        os.setgroups(user.groups)  # PEER: not for a user given by number
    except OSError as exc:
        if not user.name.isdecimal():  # else the next step fails, with the message known for it
            reason = f"Error: initgroups({user.name}, {user.gid}) failed."
            raise UsageError(reason, exits.groups) from exc
    try:
        os.setresgid(user.gid, user.gid, user.gid)
    except OSError as exc:
        raise UsageError(f"Error: setgid({user.gid}) failed.", exits.gid) from exc
    try:
        os.setresuid(user.uid, user.uid, user.uid)
    except OSError as exc:
        raise UsageError(f"Error: setuid({user.uid}) failed.", exits.uid) from exc


def change_root(path: str) -> None:
    """All paths are looked up below *path* from now on.

    Raises:
        UsageError: This process may not, or there is no such directory.
    """
    try:
        os.chroot(path)
        os.chdir("/")
    except OSError as exc:
        raise UsageError(f"chroot failed: {exc.strerror}") from exc
