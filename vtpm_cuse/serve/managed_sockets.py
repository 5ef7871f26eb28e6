"""Many clients of one TPM 2.0 on sockets, each with a data connection and a TPM of its own.

Ownership: as in `serve.sockets`, whose turn this shares. The resource manager belongs to whoever
may use the TPM: this task between two checkpoints, or the worker while the turn is taken.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from typing import TYPE_CHECKING, Final

import trio

from vtpm_cuse.proto.places import Place, Places
from vtpm_cuse.proto.stream import framed
from vtpm_cuse.serve.connections import DATA_READ_SIZE, DataConnection, hang_up
from vtpm_cuse.serve.managing import manage
from vtpm_cuse.vtpm.managed import OPENS_MAX
from vtpm_cuse.wire.tpm import TPM_HEADER_SIZE, command_size

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable

    from vtpm_cuse.proto.stream import Request
    from vtpm_cuse.resmgr.manager import Connection
    from vtpm_cuse.serve.worker import Worker
    from vtpm_cuse.vtpm.vtpm import Vtpm

log = logging.getLogger(__name__)

_CHECKPOINT_EVERY: Final = 32
_TAGS_BEGIN: Final = b"\x80"  # those of TPM 2.0; the prefix of a command begins otherwise
_FOREIGN: Final = "A client that does not speak this protocol was turned away"


class ManagedServer:
    """Serves the clients of a resource manager.

    Args:
        nursery: Where their tasks run.
        vtpm: The TPM.
        worker: Runs the long commands.
        turn: Held while one runs.
        accept: Gives the next connection of a listener.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        vtpm: Vtpm,
        worker: Worker,
        turn: trio.Lock,
        accept: Callable[[socket.socket], Awaitable[socket.socket]],
    ) -> None:
        self._nursery = nursery
        self._vtpm = vtpm
        self._worker = worker
        self._turn = turn
        self._accept = accept
        self._managed = manage(vtpm, worker)
        self._places = Places()
        self._served = 0
        self.share = self._managed.share

    async def serve(self, listener: socket.socket) -> None:
        """Serves all who come."""
        while True:
            connection = await self._accept(listener)
            client = DataConnection(connection, prefix=True, known=True)
            place = Place(functools.partial(hang_up, connection), trio.current_time())
            self._places.take(place)
            if len(self._places) > OPENS_MAX and (stranger := self._places.stranger()):
                log.warning("Too many managed clients: one was turned away")
                stranger.end()
            self._nursery.start_soon(self._serve_client, client, place)

    async def _serve_client(self, client: DataConnection, place: Place) -> None:
        async with self._turn:
            managed = self._managed.connect()
        try:
            with contextlib.closing(client.connection):
                await self._converse(client, place, managed)
        except OSError as exc:
            log.info("Managed client: %s", exc.strerror)
        except Exception:  # a bug of ours costs its client the connection, nobody else anything
            log.exception("A managed client could not be served")
        finally:
            self._places.leave(place)
        async with self._turn:
            if self._vtpm.borrowed:
                await self._worker.run(lambda: _closed(managed), self._vtpm.abort)
            else:
                managed.close()
        log.debug("Managed client disconnected")

    async def _converse(self, client: DataConnection, place: Place, managed: Connection) -> None:
        stream, connection, served = client.stream, client.connection, False
        while True:
            try:
                data: bytes | None = connection.recv(DATA_READ_SIZE)
            except BlockingIOError:
                # Who looks for more of one client lets all others wait.
                data = await client.receive(linger=served and len(self._places) == 1)
                place.heard = trio.current_time()
            if data and stream.empty and self._is_quick(data):
                # The general way below, shortened for the usual command.
                await self._send_now(client, self._managed.process(managed, data))
                served = place.known = True
                continue
            if data:
                stream.feed(data)
            while (request := client.take_request(flush=not data)) is not None:
                response = await self._process(managed, request)
                client.request = None
                await client.send(framed(response, request))
                served = place.known = True
            if stream.broken:
                log.warning(_FOREIGN)
            if stream.broken or data == b"":
                return

    def _is_quick(self, data: bytes) -> bool:
        """Whether it is one whole command that can be given to the TPM at once."""
        return (
            data[:1] == _TAGS_BEGIN
            and len(data) >= TPM_HEADER_SIZE
            and command_size(data) == len(data)
            and not self._turn.locked()
            and not self._vtpm.is_long(data)
        )

    async def _send_now(self, client: DataConnection, response: bytes) -> None:
        try:
            sent = client.connection.send(response)
        except BlockingIOError:
            sent = 0
        if sent < len(response):
            await client.send(response[sent:])
        await self._count()

    async def _count(self) -> None:
        """Passes a checkpoint now and then, so that others get their turn."""
        self._served += 1
        if self._served % _CHECKPOINT_EVERY == 0:
            await trio.lowlevel.checkpoint()

    async def _process(self, managed: Connection, request: Request) -> bytes:
        await self._count()
        if self._turn.locked():
            async with self._turn:
                pass
        if not self._vtpm.is_long(request.command):
            return self._run(managed, request)
        async with self._turn:
            response = await self._worker.run(lambda: self._run(managed, request), self._vtpm.abort)
        if self._vtpm.state_lost:
            self._nursery.cancel_scope.cancel()
            await trio.lowlevel.checkpoint()
        return response

    def _run(self, managed: Connection, request: Request) -> bytes:
        return self._managed.process(managed, request.command, request.locality)


def _closed(managed: Connection) -> bytes:
    managed.close()
    return b""
