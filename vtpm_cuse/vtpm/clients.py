"""The clients of a resource manager as their owner sees them: who they are, and what they have.

Nothing in it is secret: no contexts, no names of keys, and no handle but those that a client knows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from vtpm_cuse.resmgr import view

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vtpm_cuse.resmgr.manager import Connection, Manager
    from vtpm_cuse.resmgr.saved import SavedManager
    from vtpm_cuse.resmgr.view import Held


class Peer(NamedTuple):
    """Who a client is, as far as that can be told from here.

    Attributes:
        channel: "device", "unix" or "tcp".
        address: Of a TCP client, HOST:PORT.
        pid: Of the process that has connected, be it another one's by now; 0 where it is not seen.
        uid: Of its user; None where there is none to tell.
    """

    channel: str
    address: str = ""
    pid: int = 0
    uid: int | None = None


@dataclass(slots=True, eq=False)
class Client:
    """One of them.

    Attributes:
        connection: To the manager.
        peer: Who it is.
        since: When it came, by the clock of its maker.
        heard: When it last gave a command, or came.
    """

    connection: Connection
    peer: Peer
    since: float
    heard: float


class SavedClient(NamedTuple):
    """A client as plain values: the number of its connection, who it is, seconds since."""

    number: int
    peer: Peer
    connected: float
    idle: float


class SavedClients(NamedTuple):
    """All clients as plain values; as secret as the TPM's volatile state."""

    manager: SavedManager
    clients: tuple[SavedClient, ...]


# Any: what json.dumps takes.
def described(manager: Manager, clients: Iterable[Client], now: float) -> dict[str, Any]:
    """All of them, as JSON has it; times in seconds."""
    return {
        "clients": [
            {
                "client": client.connection.number,
                "channel": client.peer.channel,
                "address": client.peer.address or None,
                "pid": client.peer.pid or None,
                "uid": client.peer.uid,
                "connected": int(now - client.since),
                "idle": int(now - client.heard),
                "commands": client.connection.commands,
                "objects": _listed(view.objects_of(client.connection)),
                "sessions": _listed(view.sessions_of(manager, client.connection.number)),
            }
            for client in clients
        ],
        "abandoned": _listed(view.sessions_of(manager, None)),
        "swaps": {"objects": manager.objects.evictions, "sessions": manager.sessions.evictions},
        "refreshes": manager.sessions.refreshes,
        "limits": manager.limits._asdict(),
    }


def _listed(held: Iterable[Held]) -> list[dict[str, str]]:
    return [
        {"handle": f"0x{one.handle:08x}", "kind": one.kind, "place": one.place.value}
        for one in held
    ]
