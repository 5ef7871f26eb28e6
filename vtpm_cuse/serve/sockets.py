"""Data and control channel over stream sockets: what QEMU, libvirt and tpm2-tss connect to.

Ownership: every connection is a task of one nursery. A short command runs in
its task between two checkpoints; a long one runs on the worker while `_turn`
keeps everything else off the TPM that must not run beside it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from typing import TYPE_CHECKING, Final, NamedTuple

import trio

from vtpm_cuse.acquire.peers import is_connection
from vtpm_cuse.proto.places import Places
from vtpm_cuse.proto.stream import framed
from vtpm_cuse.serve.connections import (
    ControlConnection,
    DataConnection,
    adopted,
    at_end,
    hang_up,
    readable,
)
from vtpm_cuse.vtpm import control
from vtpm_cuse.vtpm.ptm import ABOUT_CLIENTS, ANSWERED_WHILE_BUSY, PtmService
from vtpm_cuse.wire.layout import BIG
from vtpm_cuse.wire.ptm import PtmCommand, PtmResult, PtmResultResponse

if TYPE_CHECKING:
    import socket

    from vtpm_cuse.acquire.chardev import CharDevice
    from vtpm_cuse.acquire.endpoints import Endpoints
    from vtpm_cuse.proto.control import ControlRequest
    from vtpm_cuse.proto.places import Place
    from vtpm_cuse.proto.stream import Request
    from vtpm_cuse.serve.connections import SavedControl, SavedData
    from vtpm_cuse.serve.managed_sockets import ManagedServer, SavedManagedSockets
    from vtpm_cuse.serve.worker import Worker

log = logging.getLogger(__name__)

_CHECKPOINT_EVERY: Final = 32
_DATA_FIRST_SECONDS: Final = 1.0
"""How long a client may say nothing while another one waits for the data channel."""

_CONTROL_REST_SECONDS: Final = 0.5
_CONTROL_WHOLE_SECONDS: Final = 60.0
"""How long a request may take to come whole: a state blob at ten kilobytes a second."""

_CONTROL_FIRST_SECONDS: Final = 0.01
"""What a client has at least to say the first word, however many come after it."""

_ACCEPT_AGAIN_SECONDS: Final = 0.1
_NO_DESCRIPTOR: Final = frozenset({errno.EMFILE, errno.ENFILE})
_FOREIGN: Final = "A client that does not speak this protocol was turned away"


class SavedSockets(NamedTuple):
    """A socket server between two commands, as plain values; descriptors by their numbers.

    Attributes:
        data_listener: Where data connections come.
        control_listener: Where control connections come.
        only: The data connection whose end is the server's.
        accepted: The one from the listener.
        passed: Those that came over the control channel.
        controls: In the order in which they came.
        managed: The clients of a resource manager, and where they come.
    """

    data_listener: int | None
    control_listener: int | None
    only: SavedData | None
    accepted: SavedData | None
    passed: tuple[SavedData, ...]
    controls: tuple[SavedControl, ...]
    managed: SavedManagedSockets | None = None


class SocketServer:
    """Serves a vTPM on sockets, with tasks in a nursery of its own."""

    def __init__(
        self,
        nursery: trio.Nursery,
        endpoints: Endpoints,
        ptm: PtmService,
        worker: Worker,
    ) -> None:
        self._nursery = nursery
        self._endpoints = endpoints
        self._vtpm = ptm.vtpm
        self._ptm = ptm
        self._worker = worker
        self._turn = trio.Lock()
        self._served = 0
        self._places = Places()
        self._managed: ManagedServer | None = None
        self._only: DataConnection | None = None
        self._accepted: DataConnection | None = None
        self._passed: list[DataConnection] = []
        self._controls: list[ControlConnection] = []

    def start(self) -> None:
        """Starts the tasks; they cancel the nursery at SHUTDOWN, or when the endpoints say so."""
        endpoints = self._endpoints
        if endpoints.data_stream is not None:
            self._only = self._data(endpoints.data_stream, known=True)
        if endpoints.control_stream is not None:
            self._admit(ControlConnection(endpoints.control_stream, trio.current_time()))
        self._start_tasks()

    async def suspend(self) -> SavedSockets:
        """The server as plain values, when no command runs any more; it ends, and its nursery.

        The descriptors stay open and are the caller's: to be used when the nursery has ended, whose
        tasks may still wait for them. After PTM_SHUTDOWN there is nothing to be suspended.
        """
        await self._turn.acquire()
        return self._suspended()

    def suspend_at_rest(self) -> SavedSockets | None:
        """As `suspend`; None, with nothing done, where a client is in the middle of something."""
        if self._turn.locked() or not self._at_rest():
            return None
        self._turn.acquire_nowait()
        return self._suspended()

    def _at_rest(self) -> bool:
        found = (self._only, self._accepted, *self._passed, *self._controls, self._managed)
        return all(one is None or one.at_rest for one in found)

    def _suspended(self) -> SavedSockets:
        endpoints, now = self._endpoints, trio.current_time()
        endpoints.spend_reserve()
        listeners = endpoints.data_listener, endpoints.control_listener
        data, controls = (None if found is None else found.detach() for found in listeners)
        saved = SavedSockets(
            data,
            controls,
            None if self._only is None else self._only.suspend(),
            None if self._accepted is None else self._accepted.suspend(),
            tuple(connection.suspend() for connection in self._passed),
            tuple(connection.suspend(now) for connection in self._controls),
            None if self._managed is None else self._managed.suspend(now),
        )
        self._end()
        return saved

    def resume(self, saved: SavedSockets) -> None:
        """In place of `start`: goes on where *saved* was suspended.

        The endpoints that this server was made with say how it ends, and have no sockets but these.
        """
        endpoints, now, vtpm = self._endpoints, trio.current_time(), self._vtpm
        if saved.data_listener is not None:
            endpoints.data_listener = adopted(saved.data_listener)
        if saved.control_listener is not None:
            endpoints.control_listener = adopted(saved.control_listener)
        if saved.only is not None:
            self._only = DataConnection.resumed(saved.only, vtpm)
            endpoints.data_stream = self._only.connection
        if saved.accepted is not None:
            self._accepted = DataConnection.resumed(saved.accepted, vtpm)
        self._passed = [DataConnection.resumed(one, vtpm) for one in saved.passed]
        for one in saved.controls:
            last = self._admit(ControlConnection.resumed(one, now))
            self._turn_away(self._places.one_to_go(last.place))  # which was about to be
        if saved.managed is not None:
            endpoints.managed_listener = adopted(saved.managed.listener)
        self._start_tasks(saved.managed)

    def _start_tasks(self, managed: SavedManagedSockets | None = None) -> None:
        endpoints, start = self._endpoints, self._nursery.start_soon
        if self._only is not None:
            start(self._serve_only_data, self._only)
        elif endpoints.data_listener is not None:
            start(self._accept_data, endpoints.data_listener)
        for passed in self._passed:
            start(self._serve_passed_data, passed)
        for connection in self._controls:
            start(self._serve_control, connection)
        if endpoints.control_listener is not None and endpoints.control_stream is None:
            start(self._accept_control, endpoints.control_listener)
        if endpoints.managed_listener is not None:
            from vtpm_cuse.serve.managed_sockets import ManagedServer

            self._managed = ManagedServer(
                self._nursery,
                self._ptm,
                self._worker,
                self._turn,
                self._accept,
                endpoints.managed_listener,
                endpoints.epoll,
                per_process=endpoints.per_process,
            )
            self._managed.start(managed)

    def _end(self) -> None:
        self._nursery.cancel_scope.cancel()

    async def _accept(self, listener: socket.socket) -> socket.socket:
        endpoints = self._endpoints
        endpoints.regain_reserve()
        await trio.lowlevel.checkpoint()  # none behind: who is accepted is not forgotten
        while True:
            try:
                connection, _ = listener.accept()
            except BlockingIOError:
                await trio.lowlevel.wait_readable(listener)
            except OSError as exc:
                if exc.errno in _NO_DESCRIPTOR:
                    stranger = self._places.stranger()
                    self._turn_away(stranger)
                    if endpoints.spend_reserve():
                        continue
                    if stranger is not None:
                        await trio.lowlevel.checkpoint()
                        continue
                await trio.lowlevel.checkpoint_if_cancelled()  # suspended: it listens no more
                # A client that has gone again, or the kernel's memory: neither lasts.
                log.warning("Could not accept a connection: %s", exc.strerror)
                await trio.sleep(_ACCEPT_AGAIN_SECONDS)
            else:
                connection.setblocking(False)
                return connection

    # -- data -----------------------------------------------------------------------------

    def _data(self, connection: socket.socket | CharDevice, *, known: bool) -> DataConnection:
        return DataConnection(connection, self._vtpm, known=known)

    async def _accept_data(self, listener: socket.socket) -> None:
        while True:
            if self._accepted is None:
                self._accepted = self._data(await self._accept(listener), known=False)
            with contextlib.closing(self._accepted.connection):
                await self._serve_data(self._accepted, listener)
            self._accepted = None
            log.debug("Data client disconnected")
            if self._endpoints.terminate:
                self._end()
                return

    async def _serve_only_data(self, data: DataConnection) -> None:
        """The end of this one is the server's; it is closed last, with the endpoints."""
        await self._serve_data(data)
        log.info("Data client disconnected")
        self._end()

    async def _serve_passed_data(self, data: DataConnection) -> None:
        with contextlib.closing(data.connection):
            await self._serve_data(data)
        log.debug("Data client disconnected")
        self._passed.remove(data)
        if self._endpoints.terminate:
            self._end()

    async def _serve_data(
        self, data: DataConnection, listener: socket.socket | None = None
    ) -> None:
        try:
            await self._converse(data, listener)
        except OSError as exc:
            await trio.lowlevel.checkpoint_if_cancelled()  # suspended: nothing has happened
            log.info("Data client: %s", exc.strerror)
        except Exception:  # a bug of ours costs its client the connection, nobody else anything
            log.exception("A data client could not be served")

    async def _converse(self, client: DataConnection, listener: socket.socket | None) -> None:
        vtpm, turn, stream, connection = self._vtpm, self._turn, client.stream, client.connection
        receive, send, process = connection.recv, client.send_now, vtpm.process_known
        plain = not (self._endpoints.disconnect or log.isEnabledFor(logging.DEBUG))
        served = await self._answer_all(client, flush=False)  # what was there at a suspension
        if self._is_over(client, served):
            return
        if self._managed is not None:
            self._managed.share()
        quick, quick_ones = plain and stream.empty, 0
        while True:
            try:
                data: bytes | None = receive(client.read_size)
            except BlockingIOError:
                client.known = client.known or served
                if listener and not client.known and not stream.awaits_rest:
                    await _first_word(connection, listener)
                data = await client.receive(linger=served)
            if quick and data and not turn.locked() and (response := process(data)) is not None:
                # The general way below, shortened for the usual command.
                if not send(response):
                    await client.send_rest()
                served = True
                quick_ones += 1
                if quick_ones == _CHECKPOINT_EVERY:
                    quick_ones = 0
                    await trio.lowlevel.checkpoint()
                continue
            if data:
                stream.feed(data)
            served = await self._answer_all(client, flush=not data)
            if self._is_over(client, served) or data == b"":
                return
            quick = plain and stream.empty

    def _is_over(self, client: DataConnection, served: bool) -> bool:
        if client.stream.broken:
            log.warning(_FOREIGN)
        return client.stream.broken or (served and self._endpoints.disconnect)

    async def _answer_all(self, client: DataConnection, *, flush: bool) -> bool:
        """Answers the commands that are there; returns whether there was one."""
        served = False
        while True:
            if client.unsent:
                await client.send_rest()
                served = True
            elif (request := client.take_request(flush=flush)) is not None:
                response = await self._process(request)
                client.request, client.unsent = None, memoryview(framed(response, request))
            else:
                return served

    async def _process(self, request: Request) -> bytes:
        vtpm = self._vtpm
        self._served += 1
        if self._served % _CHECKPOINT_EVERY == 0:
            await trio.lowlevel.checkpoint()
        if log.isEnabledFor(logging.DEBUG):
            # PEER: and the bytes, among them secrets.
            log.debug("SWTPM_IO_Read: length %d", len(request.command))
        if self._turn.locked():
            async with self._turn:
                pass
        if request.locality is not None:
            # PEER: takes it over unchecked, past --locality reject-locality-4, too.
            refusal = vtpm.enter_locality(request.locality)
            if refusal is not None:
                return refusal
        if not vtpm.is_long(request.command):
            return vtpm.process(request.command)
        async with self._turn:
            response = await self._worker.run(lambda: vtpm.process(request.command), vtpm.abort)
        if vtpm.state_lost:
            self._end()
            await trio.lowlevel.checkpoint()
        return response

    # -- control --------------------------------------------------------------------------

    async def _accept_control(self, listener: socket.socket) -> None:
        """PEER: lets a second client wait for the first to go; here all are served."""
        places = self._places
        while True:
            connection = await self._accept(listener)
            client = self._admit(ControlConnection(connection, trio.current_time()))
            self._nursery.start_soon(self._serve_control, client)
            if (first := places.one_to_go(client.place)) is not None:
                await trio.sleep_until(first.heard + _CONTROL_FIRST_SECONDS)
                self._turn_away(places.one_to_go(client.place))

    def _admit(self, client: ControlConnection) -> ControlConnection:
        self._controls.append(client)
        self._places.take(client.place)
        return client

    @staticmethod
    def _turn_away(place: Place | None) -> None:
        if place is not None:
            log.warning("Too many control clients: one was turned away")
            place.end()

    async def _serve_control(self, client: ControlConnection) -> None:
        try:
            with client.connection:
                await self._obey(client)
        except OSError as exc:
            await trio.lowlevel.checkpoint_if_cancelled()
            log.info("Control client: %s", exc.strerror)
        except Exception:  # as for data
            log.exception("A control client could not be served")
        finally:
            client.close_passed()
            self._controls.remove(client)
            self._places.leave(client.place)
            if self._endpoints.control_terminate and not len(self._places):
                self._end()

    async def _obey(self, client: ControlConnection) -> None:
        """Answers requests."""
        stream, place = client.stream, client.place
        await self._answer_request(client)  # what was there at a suspension
        over = stream.broken
        while not over:
            data = b""
            rest = _CONTROL_REST_SECONDS if stream.pressing else _CONTROL_WHOLE_SECONDS
            with trio.move_on_at(client.begun + rest) as scope:
                data = await client.receive()
            place.heard = trio.current_time()
            stream.feed(data)
            request = client.request = stream.next_request(flush=not data)
            place.held = stream.held
            client.begun = min(client.begun, place.heard) if stream.held else float("inf")
            place.known = place.known or (request is not None and request.command is not None)
            over = stream.broken
            if over and request is None:
                log.warning(_FOREIGN)
            await self._answer_request(client)
            if over or (not data and (request is None or not scope.cancelled_caught)):
                return
            if stream.held:
                self._turn_away(self._places.one_to_drop())
            await trio.lowlevel.checkpoint()

    async def _answer_request(self, client: ControlConnection) -> None:
        """Executes the request in hand, if there is one, and sends what is to be sent."""
        if client.request is not None:
            answer = await self._answer_control(client.request, client.fds)
            client.request, client.unsent = None, memoryview(answer)
            client.close_passed()
        elif not client.stream.takes_descriptor:
            client.close_passed()
        if self._ptm.shutdown_requested:  # also for one who does not take the answer
            self._end()
        await client.send_rest()

    async def _answer_control(self, request: ControlRequest, fds: list[int]) -> bytes:
        log.debug("Ctrl Cmd: 0x%x, length %d", request.number, len(request.body))
        if request.command is PtmCommand.PTM_SET_DATAFD:
            return PtmResultResponse(self._set_data_fd(fds)).pack(BIG)
        with_manager = self._vtpm.borrowed and request.command in ABOUT_CLIENTS
        if with_manager or self._vtpm.may_wait_for_lock(request.command):
            async with self._turn:
                return await self._worker.run(lambda: self._answer(request), self._vtpm.abort)
        if request.command is PtmCommand.PTM_CANCEL_TPM_CMD:
            self._nursery.start_soon(self._worker.repeat_until_ended, self._vtpm.cancel)
        if self._turn.locked() and request.command not in ANSWERED_WHILE_BUSY:
            async with self._turn:
                return self._answer(request)
        return self._answer(request)

    def _answer(self, request: ControlRequest) -> bytes:
        return control.answer(self._vtpm, self._ptm, request)

    def _set_data_fd(self, fds: list[int]) -> PtmResult:
        endpoints = self._endpoints
        # The end of the last one may be there without its task knowing it yet.
        there = [*self._passed, *filter(None, [self._accepted])]
        in_use = not all(at_end(data.connection) for data in there)
        listens = endpoints.data_listener is not None and not endpoints.passed_too
        taken = in_use or listens or endpoints.data_stream
        if taken or self._vtpm.borrowed:  # all its clients are the manager's
            return PtmResult.TPM_IOERROR
        if not fds:
            log.error("no valid data socket in message")
            return PtmResult.TPM_BAD_PARAMETER
        try:
            connection = adopted(fds[0])
        except OSError as exc:
            # PEER: takes anything, and the TPM's answers to a pipe go nowhere.
            log.error("The passed descriptor is no socket: %s", exc.strerror)
            return PtmResult.TPM_BAD_PARAMETER
        fds.pop(0)
        if endpoints.passed_too and not is_connection(connection):
            log.error(
                "The passed descriptor is no stream of this host, which alone goes on in a sleep"
            )
            connection.close()
            return PtmResult.TPM_BAD_PARAMETER
        data = self._data(connection, known=True)
        self._passed.append(data)
        self._nursery.start_soon(self._serve_passed_data, data)
        return PtmResult.TPM_SUCCESS


async def _first_word(connection: socket.socket | CharDevice, listener: socket.socket) -> None:
    """Waits for it, or the end; after a while only as long as nobody else waits for the TPM."""
    if await readable(connection, _DATA_FIRST_SECONDS):
        return
    async with trio.open_nursery() as nursery:

        async def make_way() -> None:
            await trio.lowlevel.wait_readable(listener)
            log.warning("A data client that has said nothing made way for another one")
            nursery.cancel_scope.cancel()
            hang_up(connection)

        nursery.start_soon(make_way)
        await trio.lowlevel.wait_readable(connection)
        nursery.cancel_scope.cancel()
