"""How much each client of a manager may have, and a user's clients together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from vtpm_cuse.resmgr.refusal import LAYER, Refusal
from vtpm_cuse.wire.tpm import TpmRc

if TYPE_CHECKING:
    from vtpm_cuse.resmgr.manager import Connection, Manager
    from vtpm_cuse.resmgr.sessions import Session

_SPARE_SESSIONS: Final = 2
"""For who uses the TPM past the manager: its owner, or the kernel."""


class Limits(NamedTuple):
    """How much one client may have, and for who lets them in, how many of them there may be.

    Attributes:
        objects: Of each connection.
        sessions: Of each connection.
        sessions_of_a_user: As many as a TPM has, less one connection's, and two for who owns it.
        abandoned: Sessions that closed connections left saved, for others to load.
        clients_of_a_user: As many as a TPM has sessions. Those on TCP, who have no user, count as
            one's.
        clients: In all, so that one user leaves room for others.
    """

    objects: int = 64
    sessions: int = 16
    sessions_of_a_user: int = 46
    abandoned: int = 4
    clients_of_a_user: int = 64
    clients: int = 256


def check(manager: Manager, connection: Connection, *, starts_session: bool) -> None:
    """Before one more session, or one more object. Raises Refusal."""
    if not starts_session:
        if len(connection.objects) >= manager.limits.objects:
            raise Refusal(LAYER | TpmRc.TPM_RC_OBJECT_MEMORY)
        return
    check_sessions(manager, connection, None)
    while manager.sessions.active >= _of_all(manager) and manager.sessions.drop_abandoned():
        pass


def check_sessions(manager: Manager, connection: Connection, known: Session | None) -> None:
    """Before one more session, be it *known* as somebody else's until now. Raises Refusal."""
    giver = None if known is None else manager.connections.get(known.owner or 0)
    if len(manager.sessions.of(connection.number)) >= manager.limits.sessions:
        raise Refusal(LAYER | TpmRc.TPM_RC_SESSION_MEMORY)
    within_user = giver is not None and giver.user == connection.user
    of_user = 0 if within_user else _of_user(manager, connection)
    of_all = 0 if giver is not None else manager.sessions.owned
    if of_user >= manager.limits.sessions_of_a_user or of_all >= _of_all(manager):
        raise Refusal(LAYER | TpmRc.TPM_RC_SESSION_HANDLES)


def sessions_left(manager: Manager, connection: Connection) -> int:
    """How many more a connection may have."""
    left = min(
        manager.limits.sessions - len(manager.sessions.of(connection.number)),
        manager.limits.sessions_of_a_user - _of_user(manager, connection),
        _of_all(manager) - manager.sessions.owned,
    )
    return max(left, 0)


def _of_user(manager: Manager, connection: Connection) -> int:
    """How many its user has; connections come beside a running command."""
    there = list(manager.connections.values())
    return manager.sessions.count({one.number for one in there if one.user == connection.user})


def _of_all(manager: Manager) -> int:
    return manager.sessions_max - _SPARE_SESSIONS
