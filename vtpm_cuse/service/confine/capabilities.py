"""The capabilities of a process, given up; see capabilities(7).

By system call, for python-prctl needs a compiler to be installed.
"""

from __future__ import annotations

import ctypes
import logging
import os
import stat
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

log = logging.getLogger(__name__)

# linux/capability.h, linux/prctl.h
_CAPABILITY_VERSION_3: Final = 0x20080522
CAP_CHOWN: Final = 0
CAP_DAC_OVERRIDE: Final = 1
CAP_FOWNER: Final = 3
CAP_KILL: Final = 5
CAP_SETGID: Final = 6
CAP_SETUID: Final = 7
CAP_SYS_ADMIN: Final = 21
_PR_CAPBSET_DROP: Final = 24
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_CAP_AMBIENT: Final = 47
_PR_CAP_AMBIENT_CLEAR_ALL: Final = 4
_CAPABILITIES_MAX: Final = 64

_KINDS: Final = frozenset({stat.S_IFDIR, stat.S_IFREG, stat.S_IFBLK})


def drop_capabilities(needed: Iterable[str]) -> None:
    """Gives up all capabilities but, where a path *needed* is another's, the right to write there.

    Each path is looked at by itself: of a folder, nothing that is in it.

    Raises:
        OSError: The kernel refuses.
    """
    libc = _bounded()
    permitted = _permitted(libc)
    keep = permitted & (1 << CAP_DAC_OVERRIDE | 1 << CAP_FOWNER)
    _set_capabilities(libc, effective=0, permitted=keep)
    if keep and (others := [path for path in needed if _needs_rights(path)]):
        log.info("Other users' files need the right to write to them: %s", ", ".join(others))
        _set_capabilities(libc, effective=keep, permitted=keep)
    else:
        _set_capabilities(libc, effective=0, permitted=0)


def keep_only(*wanted: int) -> None:
    """Gives up all capabilities but these, as far as it has them. Raises OSError: the kernel refuses."""
    libc = _bounded()
    keep = _permitted(libc) & sum(1 << capability for capability in wanted)
    _set_capabilities(libc, effective=keep, permitted=keep)


def bound(*those: int) -> None:
    """Gives up all capabilities but *those*, for itself and for all programs that it starts.

    Raises OSError: the kernel refuses.
    """
    libc = _bounded(those)
    keep = _permitted(libc) & sum(1 << one for one in those)
    _set_capabilities(libc, effective=keep, permitted=keep)


def gain_nothing() -> None:
    """No program and no file gives this process rights that it has not. Raises OSError."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "no_new_privs")


def _needs_rights(path: str) -> bool:
    """Whether *path* is another user's, who does not let us in.

    What is ours never needs any, whatever its mode: else a TPM that was taken over would make a file
    that keeps more rights for its next start. Nor does a link, which nobody follows, but to a device.
    """
    try:
        found = os.lstat(path)
        if stat.S_ISLNK(found.st_mode):
            found = os.stat(path)
            if not stat.S_ISBLK(found.st_mode):
                return False
    except PermissionError:  # for the folder that it is in
        return True
    except OSError:
        return False
    if found.st_uid == os.geteuid() or stat.S_IFMT(found.st_mode) not in _KINDS:
        return False
    wanted = os.R_OK | os.W_OK | (os.X_OK if stat.S_ISDIR(found.st_mode) else 0)
    return not os.access(path, wanted, effective_ids=True)


def _bounded(but: Collection[int] = ()) -> ctypes.CDLL:
    """The C library; no program that is started gets any, *but* these."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    for number in range(_CAPABILITIES_MAX):  # fails where it was none, or not ours to drop
        if number not in but:
            libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0)
    return libc


def _permitted(libc: ctypes.CDLL) -> int:
    header, data = _header(), (ctypes.c_uint32 * 6)()
    if libc.capget(header, data):
        raise OSError(ctypes.get_errno(), "capget")
    return data[1] | data[4] << 32


def _set_capabilities(libc: ctypes.CDLL, *, effective: int, permitted: int) -> None:
    low, high = 0xFFFF_FFFF, 32
    data = (ctypes.c_uint32 * 6)(
        *(effective & low, permitted & low, 0),
        *(effective >> high, permitted >> high, 0),
    )
    if libc.capset(_header(), data):
        raise OSError(ctypes.get_errno(), "capset")


def _header() -> ctypes.Array[ctypes.c_uint32]:
    return (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
