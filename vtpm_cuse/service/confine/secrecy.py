"""Keeping keys out of core dumps, debuggers and swap, as far as a process can.

By ctypes: three calls into the C library that the standard library does not offer.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys

log = logging.getLogger(__name__)

_PR_SET_DUMPABLE = 4
_BYTES_HEADER = sys.getsizeof(b"") - 1  # CPython: the bytes of an object begin here


def hide_process() -> None:
    """No core dump of this process from now on, and no debugger but root's.

    It holds until an ``execve`` or a change of the user id; whoever changes that calls this again.

    Raises:
        OSError: The kernel refuses (prctl(2)).
    """
    if _libc().prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0):
        raise _error("prctl")


def keep_from_swap(secret: bytes) -> bool:
    """Locks the page or two that *secret* lies in; returns whether mlock(2) allowed it.

    They stay locked until the process ends. Only what is locked here never reaches
    the swap: a cipher's short-lived copies may.
    """
    if sys.implementation.name != "cpython" or not secret:
        return False
    address = ctypes.c_void_p(id(secret) + _BYTES_HEADER)
    if _libc().mlock(address, ctypes.c_size_t(len(secret))):
        log.debug("%s", _error("mlock"))
        return False
    return True


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _error(function: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{function}: {os.strerror(number)}")
