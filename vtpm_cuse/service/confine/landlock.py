"""Landlock: which paths this thread, and those it starts, may still use; see landlock(7).

By system call, for the C library has no functions for it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

# linux/landlock.h; the numbers of these calls are those of every machine.
_SYS_CREATE_RULESET: Final = 444
_SYS_ADD_RULE: Final = 445
_SYS_RESTRICT_SELF: Final = 446
_CREATE_RULESET_VERSION: Final = 1
_RULE_PATH_BENEATH: Final = 1

EXECUTE: Final = 1 << 0
WRITE_FILE: Final = 1 << 1
READ_FILE: Final = 1 << 2
READ_DIR: Final = 1 << 3
REMOVE_DIR: Final = 1 << 4
REMOVE_FILE: Final = 1 << 5
MAKE_DIR: Final = 1 << 7
MAKE_REG: Final = 1 << 8
MAKE_SOCK: Final = 1 << 9
REFER: Final = 1 << 13
TRUNCATE: Final = 1 << 14
IOCTL_DEV: Final = 1 << 15
REFERS_SINCE: Final = 2
"""The version from which on a file may go from one folder to another."""

# All rights of files, TCP ports and scopes, by the version that brought them: to handle a right
# is to refuse it wherever no rule gives it.
_FILE_RIGHTS: Final = ((1, 13), (2, 14), (3, 15), (5, 16))
_NET_VERSION: Final = 4
_NET_RIGHTS: Final = 0b11
_MISSING: Final = {
    errno.ENOSYS: "this kernel has none",
    errno.EOPNOTSUPP: "it is not among the kernel's lsm= modules",
    errno.EPERM: "this process may not use it, perhaps because of a container's filter",
}
_SCOPE_VERSION: Final = 6
_SCOPES: Final = 0b11


class LandlockMissing(Exception):
    """The kernel has no Landlock, or this process may not use it; the text says which."""


def version() -> int:
    """Of the kernel's Landlock. Raises LandlockMissing."""
    found = _call(_SYS_CREATE_RULESET, None, 0, _CREATE_RULESET_VERSION)
    if found > 0:
        return found
    reason = _MISSING.get(ctypes.get_errno()) or os.strerror(ctypes.get_errno())
    raise LandlockMissing(reason)


def restrict(paths: Mapping[str, int], *, files_only: bool = False) -> None:
    """Refuses every path but *paths* with the given rights, for good; open descriptors stay.

    TCP, abstract sockets and signals to others are refused too where the kernel can, unless it is
    for *files_only*. What is not there now is refused as well. Needs no-new-privileges.

    Raises:
        LandlockMissing: Nothing is restricted.
        OSError: The kernel refuses.
    """
    abi = version()
    handled = (1 << max(bits for since, bits in _FILE_RIGHTS if since <= abi)) - 1
    attributes = [handled]
    if abi >= _NET_VERSION and not files_only:
        attributes.append(_NET_RIGHTS)
    if abi >= _SCOPE_VERSION and not files_only:
        attributes.append(_SCOPES)
    attribute = (ctypes.c_uint64 * len(attributes))(*attributes)
    ruleset = _checked(_SYS_CREATE_RULESET, attribute, ctypes.c_size_t(ctypes.sizeof(attribute)), 0)
    try:
        for path, rights in paths.items():
            _allow(ruleset, path, rights & handled)
        _checked(_SYS_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        if not os.path.isdir(path):
            rights &= EXECUTE | READ_FILE | WRITE_FILE | TRUNCATE | IOCTL_DEV
        rule = struct.pack("=Qi", rights, fd)  # struct landlock_path_beneath_attr
        _checked(_SYS_ADD_RULE, ruleset, _RULE_PATH_BENEATH, rule, 0)
    finally:
        os.close(fd)


def _checked(number: int, *arguments: object) -> int:
    result = _call(number, *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"landlock: {os.strerror(code)}")
    return result


def _call(number: int, *arguments: object) -> int:
    function = ctypes.CDLL(None, use_errno=True).syscall
    function.restype = ctypes.c_long
    return int(function(ctypes.c_long(number), *arguments))
