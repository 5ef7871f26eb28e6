"""Who has what in a manager, and its end at the wish of who owns the TPM."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, NamedTuple

from vtpm_cuse.errors import TpmError
from vtpm_cuse.resmgr.sessions import Place
from vtpm_cuse.wire.tpm2_handles import TpmHt, kind_of

if TYPE_CHECKING:
    from vtpm_cuse.resmgr.manager import Connection, Manager
    from vtpm_cuse.resmgr.sessions import Session


class Held(NamedTuple):
    """An object or a session.

    Attributes:
        handle: What its owner calls it.
        kind: "object", "sequence", "hmac" or "policy".
        place: Where it is.
    """

    handle: int
    kind: str
    place: Place


def objects_of(connection: Connection) -> list[Held]:
    """A connection's objects, in its own numbers."""
    return [
        Held(
            found.handle,
            "sequence" if found.changes else "object",
            Place.SWAPPED if found.physical is None else Place.LOADED,
        )
        for found in connection.objects.values()
    ]


def sessions_of(manager: Manager, owner: int | None) -> list[Held]:
    """A connection's sessions; of None, those that closed connections have left saved."""
    return [Held(found.handle, _kind(found), found.place) for found in manager.sessions.of(owner)]


def holds(manager: Manager, connection: Connection) -> bool:
    """Whether a connection has anything."""
    return bool(connection.objects or manager.sessions.of(connection.number))


def _kind(found: Session) -> str:
    return "hmac" if kind_of(found.handle) == TpmHt.HMAC_SESSION else "policy"


def end(manager: Manager, owner: int | None, handle: int | None) -> bool:
    """Ends what somebody has: what its *handle* stands for, or of None everything.

    Args:
        manager: The manager.
        owner: Number of a connection; None for sessions that closed ones have left saved.
        handle: As the owner calls it.

    Returns:
        Whether there was such a connection, and with a handle such an object or session.
    """
    connection = None if owner is None else manager.connections.get(owner)
    if owner is not None and connection is None:
        return False
    if connection is not None and handle in connection.objects:
        with contextlib.suppress(TpmError):  # it had ended already
            manager.objects.flush(connection.objects.pop(handle))
        return True
    if connection is not None and handle is None:
        manager.end_objects(connection)
    sessions = [found for found in manager.sessions.of(owner) if handle in {None, found.handle}]
    for found in sessions:
        with contextlib.suppress(TpmError):
            manager.sessions.flush(found)
    return handle is None or bool(sessions)
