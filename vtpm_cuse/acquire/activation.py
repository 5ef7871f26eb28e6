"""Sockets that a service manager has opened for us: LISTEN_FDS of sd_listen_fds(3)."""

from __future__ import annotations

import os
from typing import Final

from vtpm_cuse.errors import UsageError

_FIRST_FD: Final = 3
_DIGITS_MAX: Final = 9
NAMES: Final = ("data", "ctrl")


def passed_sockets() -> dict[str, int]:
    """Descriptors by name, "data" or "ctrl"; none if nobody passed any to this process.

    Raises:
        UsageError: One of them has another name, or a name comes twice.
    """
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return {}
    count = os.environ.get("LISTEN_FDS", "")
    if not (count.isascii() and count.isdecimal() and len(count) <= _DIGITS_MAX):
        return {}
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    found: dict[str, int] = {}
    for number in range(int(count)):
        name = names[number] if number < len(names) else ""
        if name not in NAMES or name in found:
            raise UsageError(
                f"The socket '{name}' of LISTEN_FDS cannot be used",
                hint="each needs a name of its own: FileDescriptorName=data or =ctrl",
            )
        found[name] = _FIRST_FD + number
    return found
