"""Many clients of one TPM 2.0 on sockets, each with a data connection and a TPM of its own.

Or each with all connections of its process, and with what is there between two of these.

Ownership: as in `serve.sockets`, whose turn this shares. The resource manager belongs to whoever
may use the TPM: this task between two checkpoints, or the worker while the turn is taken.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import socket
from typing import TYPE_CHECKING, Final, NamedTuple

import trio

from vtpm_cuse.acquire.peers import NO_UID, Credentials
from vtpm_cuse.proto.places import Place, Places
from vtpm_cuse.proto.stream import framed
from vtpm_cuse.serve.connections import NETWORK, DataConnection, hang_up
from vtpm_cuse.serve.managing import begin, manage
from vtpm_cuse.serve.processes import Processes
from vtpm_cuse.serve.resting import Resting
from vtpm_cuse.vtpm.clients import Peer

if TYPE_CHECKING:
    import select
    from collections.abc import Awaitable, Callable, Iterable

    from vtpm_cuse.proto.places import SavedPlace
    from vtpm_cuse.proto.stream import Request
    from vtpm_cuse.serve.connections import SavedData
    from vtpm_cuse.serve.processes import Process, SavedProcess
    from vtpm_cuse.serve.worker import Worker
    from vtpm_cuse.vtpm.clients import Client, SavedClients
    from vtpm_cuse.vtpm.ptm import PtmService

log = logging.getLogger(__name__)

_CHECKPOINT_EVERY: Final = 32
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
        processes: Where a process is a client, those that are.
    """

    listener: int
    clients: SavedClients
    connections: tuple[SavedManaged, ...]
    processes: tuple[SavedProcess, ...] | None


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
        epoll: For their connections alone.
        per_process: A client is a process, not a connection.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        ptm: PtmService,
        worker: Worker,
        turn: trio.Lock,
        accept: Callable[[socket.socket], Awaitable[socket.socket]],
        listener: socket.socket,
        epoll: select.epoll,
        *,
        per_process: bool = False,
    ) -> None:
        self._nursery = nursery
        self._vtpm = ptm.vtpm
        self._worker = worker
        self._turn = turn
        self._accept = accept
        self._listener = listener
        self._connections: list[_Served] = []
        self._leaving: list[Client] = []
        self._managed = manage(ptm)
        self._places = Places()
        self._resting = Resting(epoll)
        self._processes = Processes() if per_process else None
        self._served = 0
        self.share = self._managed.share

    def start(self, saved: SavedManagedSockets | None) -> None:
        """Starts the tasks that serve all who come, and those who were *saved*."""
        if saved is None:
            begin(self._managed, self._worker, borrowed=self._vtpm.borrowed)
        else:
            self._managed.resume(saved.clients)
            now = trio.current_time()
            for one in saved.connections:
                data = DataConnection.resumed(one.data, self._vtpm)
                place = self._take_place(data, now)
                place.resume(one.place, now)
                self._begin(_Served(data, place, self._managed.client(one.client)))
            if saved.processes is not None:
                self._resume_processes(saved.processes)
        self._nursery.start_soon(self._serve)
        self._nursery.start_soon(self._resting.read_all)

    @property
    def at_rest(self) -> bool:
        """Whether no client has given, or is being given, anything in part."""
        return all(one.data.at_rest for one in self._connections)

    def suspend(self, now: float) -> SavedManagedSockets:
        """As plain values, for who has the turn; the descriptors are the caller's from now on."""
        for client in self._leaving:
            process = self._process_of(client)
            if process is None or not (
                process.connections or (not process.ended and self._managed.holds(client))
            ):
                self._forget(client)
                self._managed.close(client)
        connections = tuple(
            SavedManaged(one.data.suspend(), one.place.suspend(now), one.client.connection.number)
            for one in self._connections
        )
        processes = None if self._processes is None else self._processes.suspend()
        listener = self._listener.detach()
        return SavedManagedSockets(listener, self._managed.suspend(), connections, processes)

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
            client = self._client_of(connection)
            if client is None:
                connection.close()
                continue
            data = DataConnection(connection, self._vtpm, known=True)
            place = self._take_place(data, trio.current_time())
            self._begin(_Served(data, place, client))

    def _client_of(self, connection: socket.socket) -> Client | None:
        """Who a new connection is; None where there is no room for one more."""
        processes, peer = self._processes, _peer_of(connection)
        process = None if processes is None else processes.find(connection)
        has_its_room = process is not None and self._is_back(process)
        if not has_its_room and not self._has_room(peer):
            return None
        if process is None:
            client = self._managed.connect(peer)
            process = None if processes is None else processes.begin(connection, client)
            if process is None:
                return client
            self._nursery.start_soon(self._watch, process)
        process.connections += 1
        return process.client

    def _is_back(self, process: Process) -> bool:
        """Whether it has left its place for this new one, be the end of it yet to be seen here.

        Of one connection alone, or it could leave any number of commands that wait for their turn.
        """
        if process.connections > 1:
            return False
        return all(_is_over(one.data) for one in self._connections if one.client is process.client)

    def _has_room(self, peer: Peer) -> bool:
        """Makes room for one more; False where all those before it have given commands."""
        of_user = [one.place for one in self._connections if one.client.peer.uid == peer.uid]
        of_all = [one.place for one in self._connections]
        away = [] if self._processes is None else self._processes.away()
        away_of_user = [client for client in away if client.peer.uid == peer.uid]
        limits = self._managed.limits
        for places, absent, most in (
            (of_user, away_of_user, limits.clients_of_a_user),
            (of_all, away, limits.clients),
        ):
            if len(places) + len(absent) < most:
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
                await self._converse(served)
        except OSError as exc:
            await trio.lowlevel.checkpoint_if_cancelled()  # suspended: nothing has happened
            log.info("Managed client: %s", exc.strerror)
        except Exception:  # a bug of ours costs its client the connection, nobody else anything
            log.exception("A managed client could not be served")
        finally:
            self._places.leave(place)
        self._connections.remove(served)
        process = self._process_of(client)
        if process is not None:
            process.connections -= 1
        await self._leave(client)
        log.debug("Managed client disconnected")

    async def _leave(self, client: Client) -> None:
        """A connection, or a process, has ended: so has the client, if that was all of it."""
        self._leaving.append(client)
        async with self._turn:
            if not await self._stays(client):
                self._forget(client)
                await self._at_tpm(lambda: self._close(client))
        self._leaving.remove(client)

    async def _stays(self, client: Client) -> bool:
        """Whether it has another connection, or has left what its process may come back for."""
        process = self._process_of(client)
        if process is None:
            return False
        if process.connections or process.ended:
            return process.connections > 0
        holds = await self._at_tpm(lambda: bytes(self._managed.holds(client)))  # empty for no
        return bool(holds) or process.connections > 0  # one may have come meanwhile

    async def _at_tpm(self, job: Callable[[], bytes]) -> bytes:
        """For who has the turn: here, or where a borrowed TPM is used."""
        if self._vtpm.borrowed:
            return await self._worker.run(job, self._vtpm.abort)
        return job()

    def _process_of(self, client: Client) -> Process | None:
        return None if self._processes is None else self._processes.of(client)

    def _forget(self, client: Client) -> None:
        """From now on its process is a new client."""
        process = self._process_of(client)
        if process is not None and self._processes is not None:
            self._processes.forget(process)

    async def _watch(self, process: Process) -> None:
        if await process.end():
            await self._leave(process.client)

    def _resume_processes(self, saved: Iterable[SavedProcess]) -> None:
        processes = self._processes = self._processes or Processes()
        for one in saved:
            process = processes.resume(one, self._managed.client(one.client))
            process.connections = sum(known.client is process.client for known in self._connections)
            if not process.ended:
                self._nursery.start_soon(self._watch, process)

    async def _converse(self, served: _Served) -> None:
        data, place, _ = served
        stream, ended = data.stream, False
        while not ended:
            answered = await self._answer_all(served, flush=False)
            if stream.broken:
                log.warning(_FOREIGN)
                return
            if data.at_rest and await self._rest(served, linger=answered):
                continue
            came = await data.receive(linger=False)  # the rest of a command, or the end
            place.heard = trio.current_time()
            if came:
                stream.feed(came)
            else:
                await self._answer_all(served, flush=True)
            ended = came == b""

    async def _rest(self, served: _Served, *, linger: bool) -> bool:
        """Whether there is something then that its task has to see to; else it may be the end."""
        data = served.data
        await trio.lowlevel.checkpoint_if_cancelled()  # suspended: its descriptor is elsewhere
        await self._resting.rest(data.connection.fileno(), self._reader(served), linger=linger)
        return not data.at_rest

    def _reader(self, served: _Served) -> Callable[[], bool | None]:
        """What reads of it while it rests, and answers one short command (`Resting.rest`)."""
        data, place, client = served
        receive, size, send = data.connection.recv, data.read_size, data.send_now
        stream, locked, process = data.stream, self._turn.locked, self._managed.process_known

        def read() -> bool | None:
            try:
                came = receive(size)
            except BlockingIOError:
                return None
            if not came:
                return False
            if not locked() and (response := process(client, came)) is not None:
                # What is below, shortened for the usual command.
                place.known = True  # before it has the answer
                return send(response)
            place.heard = trio.current_time()
            stream.feed(came)
            request = data.take_request(flush=False)
            if request is None or locked() or self._vtpm.is_long(request.command):
                return False
            response = self._run(client, request)
            data.request = None
            place.known = True
            return send(framed(response, request)) and stream.empty

        return read

    async def _answer_all(self, served: _Served, *, flush: bool) -> bool:
        """Answers the commands that are there; returns whether there was one."""
        data, place, client = served
        answered = bool(data.unsent)
        await data.send_rest()
        while (request := data.take_request(flush=flush)) is not None:
            response = await self._process(client, request)
            data.request = None
            answered = place.known = True
            await data.send(framed(response, request))
        return answered

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


def _is_over(data: DataConnection) -> bool:
    """Whether its client has closed it."""
    connection = data.connection
    try:
        return isinstance(connection, socket.socket) and not connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True


def _peer_of(connection: socket.socket) -> Peer:
    """Who is at the other end."""
    if connection.family in NETWORK:
        try:
            host, port, *_ = connection.getpeername()
        except OSError:  # it has gone again
            return Peer("tcp")
        return Peer("tcp", f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    pid, uid, _ = Credentials.of(connection)
    return Peer("unix", pid=pid, uid=uid if uid != NO_UID else None)
