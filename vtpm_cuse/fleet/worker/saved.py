"""What serves one TPM, and its volatile state, as bytes: from one worker to the next.

The manager keeps them unread. Descriptors are numbers of those that come along; the three first
ones are the listeners, or the first one is the kernel's. The bytes are a line of JSON, nothing that
could run, and behind it the volatile state by zlib, a ninth of its 9 KB: most of it is zero, and
there are thousands who sleep.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from vtpm_cuse.errors import ChannelError
from vtpm_cuse.fleet import heritage, plain
from vtpm_cuse.fleet.messages import BODY_MAX, Answer, Call, MessageHeader, Order, Report
from vtpm_cuse.fleet.tasks import Task
from vtpm_cuse.fleet.worker.clock import Moment
from vtpm_cuse.proto.control import SavedControlStream
from vtpm_cuse.proto.device import SavedDeviceSession
from vtpm_cuse.proto.places import SavedPlace
from vtpm_cuse.resmgr.saved import (
    Left,
    SavedConnection,
    SavedManager,
    SavedObject,
    SavedSession,
    SavedSessions,
)
from vtpm_cuse.serve.connections import SavedControl, SavedData
from vtpm_cuse.serve.device import SavedDevice
from vtpm_cuse.serve.managed_sockets import SavedManaged, SavedManagedSockets
from vtpm_cuse.serve.sockets import SavedSockets
from vtpm_cuse.vtpm.clients import Peer, SavedClient, SavedClients
from vtpm_cuse.vtpm.file import SavedBlob, SavedOpen
from vtpm_cuse.vtpm.managed import SavedManagedOpen
from vtpm_cuse.vtpm.saved import SavedVtpm

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vtpm_cuse.fleet.worker.serving import SavedServer

LISTENERS: Final = 3
"""Data, control, managed."""
_QUICKLY: Final = 1
"""zlib's level for that."""


class SavedTpm(NamedTuple):
    """Both halves, and since when they rest; nobody has served one that was only made."""

    served: SavedServer | None
    vtpm: SavedVtpm
    since: Moment


_KINDS: Final[dict[str, type[Any]]] = {
    kind.__name__: kind
    for kind in (
        *(SavedTpm, Moment, SavedSockets, SavedData, SavedControl, SavedControlStream, SavedPlace),
        *(SavedManagedSockets, SavedManaged, SavedClients, SavedClient, Peer, SavedManager, Left),
        *(SavedDevice, SavedDeviceSession, SavedOpen, SavedBlob, SavedManagedOpen),
        *(SavedConnection, SavedObject, SavedSession, SavedSessions, SavedVtpm),
    )
}

FORM: Final = plain.form(
    {**_KINDS, **heritage.KINDS, "Task": Task, "MessageHeader": MessageHeader},
    {repr(kind): kind for kinds in (Order, Report, Call, Answer) for kind in kinds},
)
"""Of all that one version of this package may have to take from another one."""


def connections_of(served: SavedServer) -> int:
    """How many descriptors go over with it."""
    found: list[int] = []

    def number(fd: int) -> int:
        found.append(fd)
        return fd

    _renumbered(served, number, (0, 1, 2))
    return len(found)


def packed(saved: SavedTpm) -> tuple[bytes, tuple[int, ...]]:
    """The bytes, and the descriptors behind the listeners."""
    found: list[int] = []

    def number(fd: int) -> int:
        found.append(fd)
        return LISTENERS + len(found) - 1

    served = saved.served and _renumbered(saved.served, number, (0, 1, 2))
    volatile, vtpm = saved.vtpm.volatile, saved.vtpm._replace(volatile=b"")
    text = plain.packed(saved._replace(served=served, vtpm=vtpm))
    return text + b"\n" + zlib.compress(volatile, _QUICKLY), tuple(found)


def unpacked(data: bytes, descriptors: Sequence[int]) -> SavedTpm:
    """The reverse; *descriptors* has the listeners first. Raises ChannelError."""
    text, _, rest = data.partition(b"\n")
    saved = plain.unpacked(text, _KINDS)
    try:
        volatile = zlib.decompressobj().decompress(rest, BODY_MAX)
        served = saved.served and _renumbered(
            saved.served, descriptors.__getitem__, descriptors[:LISTENERS]
        )
        vtpm = saved.vtpm._replace(volatile=volatile)
        found: SavedTpm = saved._replace(served=served, vtpm=vtpm)
    except (LookupError, TypeError, AttributeError, zlib.error) as exc:
        raise ChannelError(f"no saved TPM: {exc}") from exc
    return found


def _renumbered(
    saved: SavedServer, number: Callable[[int], int], listeners: Sequence[int]
) -> SavedServer:
    if isinstance(saved, SavedDevice):  # which has all on its channels
        return saved

    def data(one: SavedData) -> SavedData:
        return one._replace(fd=number(one.fd))

    if saved.data_listener is None:  # the kernel is the only client, in the first's place
        return saved._replace(only=saved.only and saved.only._replace(fd=listeners[0]))
    managed = saved.managed
    return saved._replace(
        data_listener=listeners[0],
        control_listener=listeners[1],
        only=saved.only and data(saved.only),
        accepted=saved.accepted and data(saved.accepted),
        passed=tuple(map(data, saved.passed)),
        controls=tuple(one._replace(fd=number(one.fd)) for one in saved.controls),
        managed=managed
        and managed._replace(
            listener=listeners[2],
            connections=tuple(one._replace(data=data(one.data)) for one in managed.connections),
        ),
    )
