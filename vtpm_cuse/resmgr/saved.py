"""A manager between two commands, as plain values; as secret as the TPM's volatile state.

It belongs to that state, in which what is loaded has the same handles.
"""

from __future__ import annotations

from typing import NamedTuple


class SavedObject(NamedTuple):
    """An object; see `objects.Object`."""

    handle: int
    changes: bool
    physical: int | None
    context: bytes | None
    used: int


class SavedSession(NamedTuple):
    """A session; see `sessions.Session`. *place* is a `Place`'s value."""

    handle: int
    owner: int | None
    place: str
    context: bytes
    sequence: int
    digest: bytes
    used: int


class SavedSessions(NamedTuple):
    """All sessions: those that are not loaded in the order of their contexts, the oldest first."""

    slots: int
    gap: int
    sessions: tuple[SavedSession, ...]
    evictions: int
    refreshes: int


class SavedConnection(NamedTuple):
    """A connection; see `manager.Connection`."""

    number: int
    user: int | None
    next_handle: int
    commands: int
    objects: tuple[SavedObject, ...]


class Left(NamedTuple):
    """What somebody else has left in the TPM: handles of objects, loaded sessions and saved ones."""

    objects: tuple[int, ...] = ()
    loaded: tuple[int, ...] = ()
    saved: tuple[int, ...] = ()


class SavedManager(NamedTuple):
    """A manager.

    Attributes:
        alone: Nobody else uses the TPM.
        known: Whether the TPM has been asked what it is like.
        ready: Whether, since then, a client has used it.
        resumed: Whether it went on from where another left off.
        left: What was in it when it was asked, until a client uses it.
        commands: What it says of each of its commands; see `commands.Commands.words`.
        sessions_max: Sessions that it has.
        slots: Objects that it holds.
        next_number: Of the next connection.
        clock: The next value of the count of commands.
        inner_commands: Given so far.
        object_evictions: So far.
        connections: In the order in which they came.
        sessions: Of all of them.
    """

    alone: bool
    known: bool
    ready: bool
    resumed: bool
    left: Left
    commands: bytes
    sessions_max: int
    slots: int
    next_number: int
    clock: int
    inner_commands: int
    object_evictions: int
    connections: tuple[SavedConnection, ...]
    sessions: SavedSessions
