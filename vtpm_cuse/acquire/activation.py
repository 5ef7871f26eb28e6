"""Sockets that a service manager has opened for us: LISTEN_FDS of sd_listen_fds(3)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from vtpm_cuse.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

_FIRST_FD: Final = 3
_DIGITS_MAX: Final = 9
EMULATORS: Final = ("data", "ctrl")
MANAGERS: Final = ("manager", "depot")


def passed_sockets(known: Sequence[str] = EMULATORS, taken: Collection[int] = ()) -> dict[str, int]:
    """Descriptors by the names *known*; none if nobody passed any to this process.

    Those in *taken* are left out: options name them by number, so their names say nothing.

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
        if _FIRST_FD + number in taken:
            continue
        name = names[number] if number < len(names) else ""
        if name not in known or name in found:
            raise UsageError(
                f"The socket '{name}' of LISTEN_FDS cannot be used",
                hint=f"each needs a name of its own: FileDescriptorName={' or ='.join(known)}",
            )
        found[name] = _FIRST_FD + number
    return found
