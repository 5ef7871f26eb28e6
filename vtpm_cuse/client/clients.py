"""What a vTPM tells of its resource manager's clients (PTM_GET_CLIENTS), checked."""

from __future__ import annotations

import json
from typing import Any, NamedTuple, TypeVar

from vtpm_cuse.errors import AnswerError
from vtpm_cuse.wire.ptm import PtmResult

Kind = TypeVar("Kind", str, int)


class Held(NamedTuple):
    """An object or session.

    Attributes:
        handle: What its client calls it.
        kind: "object", "sequence", "hmac" or "policy".
        place: "loaded", "swapped" or "saved".
    """

    handle: int
    kind: str
    place: str


class ClientInfo(NamedTuple):
    """A client.

    Attributes:
        number: Tells it apart, from past ones too.
        channel: "device", "unix" or "tcp".
        address: Of a TCP client; else empty.
        pid: The process that has connected, if it can be seen.
        uid: Its user, if it can be told.
        connected: Seconds since it came.
        idle: Seconds since its last command.
        commands: How many it has given.
        objects: Its objects.
        sessions: Its sessions.
    """

    number: int
    channel: str
    address: str
    pid: int | None
    uid: int | None
    connected: int
    idle: int
    commands: int
    objects: tuple[Held, ...]
    sessions: tuple[Held, ...]


class ClientsInfo(NamedTuple):
    """All of them.

    Attributes:
        clients: In the order in which they came.
        abandoned: Sessions that clients have left saved, for others to load.
        object_swaps: Objects that had to make way since the TPM was started.
        session_swaps: The same of sessions.
        refreshes: Saved sessions that were kept from growing too old.
        limits: What a client may have, by name.
    """

    clients: tuple[ClientInfo, ...]
    abandoned: tuple[Held, ...]
    object_swaps: int
    session_swaps: int
    refreshes: int
    limits: dict[str, int]


def read_clients(text: str) -> ClientsInfo:
    """The text of PTM_GET_CLIENTS. Raises AnswerError for what no vTPM tells."""
    try:
        found = json.loads(text)
        swaps, limits = found["swaps"], found["limits"]
        return ClientsInfo(
            tuple(_client(one) for one in found["clients"]),
            _held(found["abandoned"]),
            _a(int, swaps["objects"]),
            _a(int, swaps["sessions"]),
            _a(int, found["refreshes"]),
            {_a(str, name): _a(int, value) for name, value in limits.items()},
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise AnswerError(PtmResult.TPM_FAIL, "It answers what is no list of clients") from exc


def _client(found: dict[str, Any]) -> ClientInfo:
    return ClientInfo(
        _a(int, found["client"]),
        _a(str, found["channel"]),
        _a(str, found["address"] or ""),
        None if found["pid"] is None else _a(int, found["pid"]),
        None if found["uid"] is None else _a(int, found["uid"]),
        _a(int, found["connected"]),
        _a(int, found["idle"]),
        _a(int, found["commands"]),
        _held(found["objects"]),
        _held(found["sessions"]),
    )


def _held(found: list[dict[str, Any]]) -> tuple[Held, ...]:
    return tuple(
        Held(int(_a(str, one["handle"]), 16), _a(str, one["kind"]), _a(str, one["place"]))
        for one in found
    )


def _a(kind: type[Kind], value: object) -> Kind:
    if type(value) is not kind:
        raise TypeError(value)
    return value
