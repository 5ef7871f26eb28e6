"""Where other resource managers answer otherwise than ours, by the row of docs/differences.md."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping


def _properties(*numbers: int) -> tuple[str, ...]:
    return tuple(f"property {number}" for number in numbers)


def _counted(what: str, first: int, last: int) -> tuple[str, ...]:
    return tuple(f"{what} {number} of one client" for number in range(first, last + 1))


ABRMD: Final[Mapping[str, tuple[str, ...]]] = {
    "a handle that is not the client's": (
        *("foreign object used", "foreign object saved", "flushed object used"),
        *("completed sequence used", "foreign session used", "foreign session saved"),
        *("foreign session in the authorization area", "HMAC session saved by its client"),
        *("saved session used", "session flushed again", "flush of 02000050"),
        *("use of 80FFFFFF", "use of 03000050"),
    ),
    "a command code that there is not": ("unknown command", "unknown vendor command"),
    "a command without all of its handles": (
        *("no handle", "half a handle", "no handle to save", "no handle to flush"),
    ),
    "sessions in lists": (
        *("list of loaded sessions", "list of saved sessions, none is"),
        "list of saved sessions, one is",
    ),
    "a session's context, loaded twice": (
        "session loaded twice",
        "session handed over, used again",
    ),
    "limits among the properties": _properties(111, 204, 205, 206, 207),
    "objects and sessions, at most": (
        *_counted("object", 29, 64),
        *_counted("session", 5, 16),
    ),
    "after a Clear by another client": ("primary, after it", "list after it"),
    "a session that another client flushes": (
        *("foreign session flushed", "victim's session after that"),
    ),
    "a TPM2_GetCapability that the TPM refuses": (
        *("unknown kind of handles", "unknown capability", "random, after all"),
    ),
}
"""tpm2-abrmd 3.0.0, beside our socket."""

KERNEL: Final[Mapping[str, tuple[str, ...]]] = {
    "a handle that is not the client's": (
        *("foreign object used", "foreign object saved", "flushed object used"),
        *("completed sequence used", "foreign session used", "foreign session saved"),
        *("foreign session in the authorization area", "HMAC session saved by its client"),
        *("saved session used", "session flushed again"),
        *("flush of 02000050", "use of 80FFFFFF", "use of 03000050"),
    ),
    "the first object's handle": ("flush of 80FFFFFF",),
    "a command without all of its handles": (
        *("no handle", "half a handle", "no handle to save", "no handle to flush"),
    ),
    "sessions in lists": ("list of saved sessions, none is", "list of saved sessions, one is"),
    "objects in a list that begins at one of them": ("list from the second",),
    "limits among the properties": _properties(111, 114, 204, 205, 206, 207),
    "objects and sessions, at most": (
        *_counted("object", 4, 65),
        *_counted("session", 4, 17),
    ),
    "saved sessions of clients that have gone": ("session that E1 left", "session that E2 left"),
    "after a Clear by another client": (
        *("primary, after it", "object, after it", "list after it"),
    ),
    "a session that another client flushes": (
        *("foreign session flushed", "victim's session after that", "victim's other commands"),
    ),
}
"""/dev/tpmrmN of Linux 6.1, beside our device."""


def steps_of(differences: Mapping[str, tuple[str, ...]]) -> set[str]:
    """All steps of the stream that answer otherwise."""
    return {name for names in differences.values() for name in names}
