"""Many clients of one TPM 2.0 on sockets, each with a data connection and a TPM of its own.

Ownership: as in `serve.sockets`, whose turn this shares. The resource manager belongs to whoever
may use the TPM: this task between two checkpoints, or the worker while the turn is taken.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import socket
import struct
from typing import TYPE_CHECKING, Final, NamedTuple

import trio

from vtpm_cuse.proto.places import Place, Places
from vtpm_cuse.proto.stream import framed
from vtpm_cuse.serve.connections import NETWORK, DataConnection, hang_up
from vtpm_cuse.serve.managing import manage
from vtpm_cuse.vtpm.clients import Peer
from vtpm_cuse.wire.tpm import TPM_HEADER_SIZE, command_size

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from vtpm_cuse.proto.places import SavedPlace
    from vtpm_cuse.proto.stream import Request
    from vtpm_cuse.serve.connections import SavedData
    from vtpm_cuse.serve.worker import Worker
    from vtpm_cuse.vtpm.clients import Client, SavedClients
    from vtpm_cuse.vtpm.ptm import PtmService

log = logging.getLogger(__name__)

_CHECKPOINT_EVERY: Final = 32
_TAGS_BEGIN: Final = b"\x80"  # those of TPM 2.0; the prefix of a command begins otherwise
_UCRED: Final = struct.Struct("=iII")  # struct ucred of linux/socket.h: process, user, group
_NOBODY: Final = 0xFFFF_FFFF
_FOREIGN: Final = "A client that does not speak this protocol was turned away"


class SavedManaged(NamedTuple):
    """A client's connection between two commands, as plain values.

    Attributes:
        data: The connection.
        place: Of it among the others.
        client: The client's number.
    """

    data: SavedData
    place: SavedPlace
    client: int


class SavedManagedSockets(NamedTuple):
    """All clients as plain values; descriptors by their numbers.

    Attributes:
        listener: Where they come.
        clients: Who they are, and what they have.
        connections: In the order in which they came.
    """

    listener: int
    clients: SavedClients
    connections: tuple[SavedManaged, ...]


class _Served(NamedTuple):
    data: DataConnection
    place: Place
    client: Client


class ManagedServer:
    """Serves the clients of a resource manager.

    Args:
        nursery: Where their tasks run.
        ptm: Tells of them.
        worker: Runs the long commands.
        turn: Held while one runs.
        accept: Gives the next connection of a listener.
        listener: Where they come.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        ptm: PtmService,
        worker: Worker,
        turn: trio.Lock,
        accept: Callable[[socket.socket], Awaitable[socket.socket]],
        listener: socket.socket,
    ) -> None:
        self._nursery = nursery
        self._vtpm = ptm.vtpm
        self._worker = worker
        self._turn = turn
        self._accept = accept
        self._listener = listener
        self._connections: list[_Served] = []
        self._leaving: list[Client] = []
        self._managed = manage(ptm, worker)
        self._places = Places()
        self._served = 0
        self.share = self._managed.share

    def start(self, saved: SavedManagedSockets | None) -> None:
        """Starts the tasks that serve all who come, and those who were *saved*."""
        if saved is not None:
            self._managed.resume(saved.clients)
            now = trio.current_time()
            for one in saved.connections:
                data = DataConnection.resumed(one.data, self._vtpm)
                place = self._take_place(data, now)
                place.resume(one.place, now)
                self._begin(_Served(data, place, self._managed.client(one.client)))
        self._nursery.start_soon(self._serve)

    def suspend(self, now: float) -> SavedManagedSockets:
        """As plain values, for who has the turn; the descriptors are the caller's from now on."""
        for client in self._leaving:
            self._managed.close(client)
        connections = tuple(
            SavedManaged(one.data.suspend(), one.place.suspend(now), one.client.connection.number)
            for one in self._connections
        )
        return SavedManagedSockets(self._listener.detach(), self._managed.suspend(), connections)

    def _take_place(self, data: DataConnection, now: float) -> Place:
        place = Place(functools.partial(hang_up, data.connection), now)
        self._places.take(place)
        return place

    def _begin(self, served: _Served) -> None:
        self._connections.append(served)
        self._nursery.start_soon(self._serve_client, served)

    async def _serve(self) -> None:
        while True:
            connection = await self._accept(self._listener)
            peer = _peer_of(connection)
            if not self._has_room(peer):
                connection.close()
                continue
            data = DataConnection(connection, self._vtpm, known=True)
            place = self._take_place(data, trio.current_time())
            self._begin(_Served(data, place, self._managed.connect(peer)))

    def _has_room(self, peer: Peer) -> bool:
        """Makes room for one more; False where all those before it have given commands."""
        of_user = [one.place for one in self._connections if one.client.peer.uid == peer.uid]
        of_all = [one.place for one in self._connections]
        limits = self._managed.limits
        for places, most in ((of_user, limits.clients_of_a_user), (of_all, limits.clients)):
            if len(places) < most:
                continue
            log.warning("Too many managed clients: one was turned away")
            strangers = [place for place in places if not place.known]
            if not strangers:
                return False
            min(strangers, key=lambda place: place.heard).end()
        return True

    async def _serve_client(self, served: _Served) -> None:
        data, place, client = served
        try:
            with contextlib.closing(data.connection):
                await self._converse(data, place, client)
        except OSError as exc:
            await trio.lowlevel.checkpoint_if_cancelled()  # suspended: nothing has happened
            log.info("Managed client: %s", exc.strerror)
        except Exception:  # a bug of ours costs its client the connection, nobody else anything
            log.exception("A managed client could not be served")
        finally:
            self._places.leave(place)
        self._connections.remove(served)
        self._leaving.append(client)
        async with self._turn:
            if self._vtpm.borrowed:
                await self._worker.run(lambda: self._close(client), self._vtpm.abort)
            else:
                self._managed.close(client)
        self._leaving.remove(client)
        log.debug("Managed client disconnected")

    async def _converse(self, data: DataConnection, place: Place, client: Client) -> None:
        stream, connection = data.stream, data.connection
        served = await self._answer_all(
            data, place, client, flush=False
        )  # what was there at a suspension
        while True:
            try:
                came: bytes | None = connection.recv(data.read_size)
            except BlockingIOError:
                # Who looks for more of one client lets all others wait.
                came = await data.receive(linger=served and len(self._places) == 1)
                place.heard = trio.current_time()
            if came and stream.empty and self._is_quick(came):
                # The general way below, shortened for the usual command.
                response = self._managed.process(client, came)
                served = place.known = True  # before it has the answer
                await self._send_now(data, response)
                continue
            if came:
                stream.feed(came)
            if await self._answer_all(data, place, client, flush=not came):
                served = True
            if stream.broken:
                log.warning(_FOREIGN)
            if stream.broken or came == b"":
                return

    async def _answer_all(
        self, data: DataConnection, place: Place, client: Client, *, flush: bool
    ) -> bool:
        """Answers the commands that are there; returns whether there was one."""
        served = bool(data.unsent)
        await data.send_rest()
        while (request := data.take_request(flush=flush)) is not None:
            response = await self._process(client, request)
            data.request = None
            served = place.known = True
            await data.send(framed(response, request))
        return served

    def _is_quick(self, data: bytes) -> bool:
        """Whether it is one whole command that can be given to the TPM at once."""
        return (
            data[:1] == _TAGS_BEGIN
            and len(data) >= TPM_HEADER_SIZE
            and command_size(data) == len(data)
            and not self._turn.locked()
            and not self._vtpm.is_long(data)
        )

    async def _send_now(self, data: DataConnection, response: bytes) -> None:
        try:
            sent = data.connection.send(response)
        except BlockingIOError:
            sent = 0
        if sent < len(response):
            await data.send(response[sent:])
        await self._count()

    async def _count(self) -> None:
        """Passes a checkpoint now and then, so that others get their turn."""
        self._served += 1
        if self._served % _CHECKPOINT_EVERY == 0:
            await trio.lowlevel.checkpoint()

    async def _process(self, client: Client, request: Request) -> bytes:
        await self._count()
        if self._turn.locked():
            async with self._turn:
                pass
        if not self._vtpm.is_long(request.command):
            return self._run(client, request)
        async with self._turn:
            response = await self._worker.run(lambda: self._run(client, request), self._vtpm.abort)
        if self._vtpm.state_lost:
            self._nursery.cancel_scope.cancel()
            await trio.lowlevel.checkpoint()
        return response

    def _run(self, client: Client, request: Request) -> bytes:
        return self._managed.process(client, request.command, request.locality)

    def _close(self, client: Client) -> bytes:
        self._managed.close(client)
        return b""


def _peer_of(connection: socket.socket) -> Peer:
    """Who is at the other end."""
    if connection.family in NETWORK:
        try:
            host, port, *_ = connection.getpeername()
        except OSError:  # it has gone again
            return Peer("tcp")
        return Peer("tcp", f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, _ = _UCRED.unpack(credentials)
    return Peer("unix", pid=pid, uid=uid if uid != _NOBODY else None)
