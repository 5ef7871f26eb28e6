"""Data and control channel over stream sockets: what QEMU, libvirt and tpm2-tss connect to.

Ownership: every connection is a task of one nursery. A short command runs in
its task between two checkpoints; a long one runs on the worker while `_turn`
keeps everything else off the TPM that must not run beside it.
"""

from __future__ import annotations

import array
import contextlib
import errno
import functools
import logging
import os
import socket
import time
from typing import TYPE_CHECKING, Final

import trio

from vtpm_cuse.acquire.chardev import CharDevice
from vtpm_cuse.proto.control import ControlRequest, ControlStream
from vtpm_cuse.proto.places import Place, Places
from vtpm_cuse.proto.stream import CommandStream, MessageStream, Request, framed
from vtpm_cuse.vtpm import control
from vtpm_cuse.vtpm.ptm import ANSWERED_WHILE_BUSY, PtmService
from vtpm_cuse.wire.layout import BIG
from vtpm_cuse.wire.ptm import PtmCommand, PtmResult, PtmResultResponse
from vtpm_cuse.wire.tpm import TPM_BUFFER_MAX, SendCommandHeader

if TYPE_CHECKING:
    from vtpm_cuse.acquire.endpoints import Endpoints
    from vtpm_cuse.serve.worker import Worker

log = logging.getLogger(__name__)

_READ_SIZE: Final = 16384
_DATA_READ_SIZE: Final = TPM_BUFFER_MAX + SendCommandHeader.SIZE
_LINGER_SECONDS: Final = 50e-6
"""How long a data connection looks for the next command before it sleeps."""

_CHECKPOINT_EVERY: Final = 32
_DATA_REST_SECONDS: Final = 1.0
"""How long the rest of a command may take; then the TPM answers to what is there."""

_DATA_FIRST_SECONDS: Final = 1.0
"""How long a client may say nothing while another one waits for the data channel."""

_CONTROL_REST_SECONDS: Final = 0.5
_CONTROL_WHOLE_SECONDS: Final = 60.0
"""How long a request may take to come whole: a state blob at ten kilobytes a second."""

_CONTROL_FIRST_SECONDS: Final = 0.01
"""What a client has at least to say the first word, however many come after it."""

_ACCEPT_AGAIN_SECONDS: Final = 0.1
_NO_DESCRIPTOR: Final = frozenset({errno.EMFILE, errno.ENFILE})
_NETWORK: Final = frozenset({socket.AF_INET, socket.AF_INET6})
_FOREIGN: Final = "A client that does not speak this protocol was turned away"
_ROOM_FOR_ONE: Final = socket.CMSG_LEN(array.array("i").itemsize)


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
        self._passed: socket.socket | None = None

    def start(self) -> None:
        """Starts the tasks; they cancel the nursery at SHUTDOWN, or when the endpoints say so."""
        endpoints, start = self._endpoints, self._nursery.start_soon
        if endpoints.data_stream is not None:
            start(self._serve_only_data, endpoints.data_stream)
        elif endpoints.data_listener is not None:
            start(self._accept_data, endpoints.data_listener)
        if endpoints.control_stream is not None:
            place = self._take_place(endpoints.control_stream)
            start(self._serve_control, endpoints.control_stream, place)
        elif endpoints.control_listener is not None:
            start(self._accept_control, endpoints.control_listener)

    def _end(self) -> None:
        self._nursery.cancel_scope.cancel()

    async def _accept(self, listener: socket.socket) -> socket.socket:
        endpoints = self._endpoints
        endpoints.regain_reserve()
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
                # A client that has gone again, or the kernel's memory: neither lasts.
                log.warning("Could not accept a connection: %s", exc.strerror)
                await trio.sleep(_ACCEPT_AGAIN_SECONDS)
            else:
                connection.setblocking(False)
                await trio.lowlevel.checkpoint()
                return connection

    # -- data -----------------------------------------------------------------------------

    async def _accept_data(self, listener: socket.socket) -> None:
        while True:
            with await self._accept(listener) as connection:
                await self._serve_data(connection, listener)
            log.debug("Data client disconnected")
            if self._endpoints.terminate:
                self._end()
                return

    async def _serve_only_data(self, connection: socket.socket | CharDevice) -> None:
        """The end of this one is the server's; it is closed last, with the endpoints."""
        await self._serve_data(connection)
        log.info("Data client disconnected")
        self._end()

    async def _serve_passed_data(self, connection: socket.socket) -> None:
        with connection:
            await self._serve_data(connection)
        log.debug("Data client disconnected")
        if self._passed is connection:
            self._passed = None
        if self._endpoints.terminate:
            self._end()

    async def _serve_data(
        self, connection: socket.socket | CharDevice, listener: socket.socket | None = None
    ) -> None:
        try:
            await self._converse(connection, listener)
        except OSError as exc:
            log.info("Data client: %s", exc.strerror)
        except Exception:  # a bug of ours costs its client the connection, nobody else anything
            log.exception("A data client could not be served")

    async def _converse(
        self, connection: socket.socket | CharDevice, listener: socket.socket | None
    ) -> None:
        vtpm, turn = self._vtpm, self._turn
        receive, send, process = connection.recv, connection.send, vtpm.process_known
        whole = isinstance(connection, CharDevice) and connection.messages
        strict = _from_network(connection)
        stream = MessageStream() if whole else CommandStream(prefix=vtpm.tpm2, strict=strict)
        plain = not (self._endpoints.disconnect or log.isEnabledFor(logging.DEBUG))
        quick = plain
        known, served, quick_ones = listener is None, False, 0
        while True:
            try:
                data: bytes | None = receive(_DATA_READ_SIZE)
            except BlockingIOError:
                known = known or served
                if listener and not known and not stream.awaits_rest:
                    await _first_word(connection, listener)
                data = await _receive(connection, stream, linger=served)
            if quick and data and not turn.locked() and (response := process(data)) is not None:
                # The general way below, shortened for the usual command.
                try:
                    sent = send(response)
                except BlockingIOError:
                    sent = 0
                if sent < len(response):
                    await _send_all(connection, response[sent:])
                served = True
                quick_ones += 1
                if quick_ones == _CHECKPOINT_EVERY:
                    quick_ones = 0
                    await trio.lowlevel.checkpoint()
                continue
            if data:
                stream.feed(data)
            served = False
            while (request := stream.next_request(flush=not data)) is not None:
                response = await self._process(request)
                await _send_all(connection, framed(response, request))
                served = True
            if stream.broken:
                log.warning(_FOREIGN)
                return
            quick = plain and stream.empty
            if data == b"" or (served and self._endpoints.disconnect):
                return

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
            place = self._take_place(connection)
            self._nursery.start_soon(self._serve_control, connection, place)
            if (first := places.one_to_go(place)) is not None:
                await trio.sleep_until(first.heard + _CONTROL_FIRST_SECONDS)
                self._turn_away(places.one_to_go(place))

    def _take_place(self, connection: socket.socket) -> Place:
        place = Place(functools.partial(_hang_up, connection), trio.current_time())
        self._places.take(place)
        return place

    @staticmethod
    def _turn_away(place: Place | None) -> None:
        if place is not None:
            log.warning("Too many control clients: one was turned away")
            place.end()

    async def _serve_control(self, connection: socket.socket, place: Place) -> None:
        fds: list[int] = []
        try:
            with connection:
                await self._obey(connection, place, fds)
        except OSError as exc:
            log.info("Control client: %s", exc.strerror)
        except Exception:  # as for data
            log.exception("A control client could not be served")
        finally:
            _close_beyond(0, fds)
            self._places.leave(place)
            if self._endpoints.control_terminate and not len(self._places):
                self._end()

    async def _obey(self, connection: socket.socket, place: Place, fds: list[int]) -> None:
        """Answers requests; *fds* has the one passed with a request that is not complete yet."""
        stream = ControlStream(strict=_from_network(connection))
        begun = float("inf")
        while True:
            data = b""
            rest = _CONTROL_REST_SECONDS if stream.pressing else _CONTROL_WHOLE_SECONDS
            with trio.move_on_at(begun + rest) as scope:
                data = await _receive_with_fd(connection, fds)
            place.heard = trio.current_time()
            stream.feed(data)
            request = stream.next_request(flush=not data)
            place.held = stream.held
            place.known = place.known or (request is not None and request.command is not None)
            answer = request and await self._answer_control(request, fds)
            if request is not None or not stream.takes_descriptor:
                _close_beyond(0, fds)
            if self._ptm.shutdown_requested:  # also for one who does not take the answer
                self._end()
            if answer:
                await _send_all(connection, answer)
            if stream.broken:
                if request is None:
                    log.warning(_FOREIGN)
                return
            if not data and (request is None or not scope.cancelled_caught):
                return
            if not stream.held:
                begun = float("inf")
            else:
                begun = min(begun, place.heard)
                self._turn_away(self._places.one_to_drop())
            await trio.lowlevel.checkpoint()

    async def _answer_control(self, request: ControlRequest, fds: list[int]) -> bytes:
        log.debug("Ctrl Cmd: 0x%x, length %d", request.number, len(request.body))
        if request.command is PtmCommand.PTM_SET_DATAFD:
            return PtmResultResponse(self._set_data_fd(fds)).pack(BIG)
        if self._vtpm.may_wait_for_lock(request.command):
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
        endpoints, passed = self._endpoints, self._passed
        # The end of the last one may be there without its task knowing it yet.
        in_use = passed is not None and not _at_end(passed)
        if in_use or endpoints.data_listener or endpoints.data_stream:
            return PtmResult.TPM_IOERROR
        if not fds:
            log.error("no valid data socket in message")
            return PtmResult.TPM_BAD_PARAMETER
        try:
            connection = socket.socket(fileno=fds[0])
        except OSError as exc:
            # PEER: takes anything, and the TPM's answers to a pipe go nowhere.
            log.error("The passed descriptor is no socket: %s", exc.strerror)
            return PtmResult.TPM_BAD_PARAMETER
        fds.pop(0)
        connection.setblocking(False)
        self._passed = connection
        self._nursery.start_soon(self._serve_passed_data, connection)
        return PtmResult.TPM_SUCCESS


def _at_end(connection: socket.socket) -> bool:
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def _from_network(connection: socket.socket | CharDevice) -> bool:
    """Whether it may come from a web browser, as nothing on a Unix socket does."""
    return isinstance(connection, socket.socket) and connection.family in _NETWORK


def _hang_up(connection: socket.socket | CharDevice) -> None:
    """Its task finds the end of the stream."""
    if isinstance(connection, socket.socket):
        with contextlib.suppress(OSError):  # it has gone itself
            connection.shutdown(socket.SHUT_RDWR)


async def _receive(
    connection: socket.socket | CharDevice, stream: CommandStream, *, linger: bool
) -> bytes | None:
    """Bytes; none at the end of the stream; None when the rest of a command does not come.

    With *linger*, looks for them a while before it sleeps.
    """
    until = time.perf_counter() + _LINGER_SECONDS if linger else 0.0
    while True:
        if time.perf_counter() < until:
            os.sched_yield()
        elif not await _readable(connection, _DATA_REST_SECONDS if stream.awaits_rest else None):
            return None
        try:
            return connection.recv(_DATA_READ_SIZE)
        except BlockingIOError:
            continue


async def _first_word(connection: socket.socket | CharDevice, listener: socket.socket) -> None:
    """Waits for it, or the end; after a while only as long as nobody else waits for the TPM."""
    if await _readable(connection, _DATA_FIRST_SECONDS):
        return
    async with trio.open_nursery() as nursery:

        async def make_way() -> None:
            await trio.lowlevel.wait_readable(listener)
            log.warning("A data client that has said nothing made way for another one")
            nursery.cancel_scope.cancel()
            _hang_up(connection)

        nursery.start_soon(make_way)
        await trio.lowlevel.wait_readable(connection)
        nursery.cancel_scope.cancel()


async def _readable(connection: socket.socket | CharDevice, seconds: float | None) -> bool:
    """Waits for bytes or the end; False when *seconds* passed first."""
    if seconds is None:
        await trio.lowlevel.wait_readable(connection)
        return True
    with trio.move_on_after(seconds) as scope:
        await trio.lowlevel.wait_readable(connection)
    return not scope.cancelled_caught


async def _send_all(connection: socket.socket | CharDevice, data: bytes) -> None:
    view = memoryview(data)
    while True:
        try:
            sent = connection.send(view)
        except BlockingIOError:
            sent = 0
        if sent == len(view):
            return
        view = view[sent:]
        await trio.lowlevel.wait_writable(connection)


async def _receive_with_fd(connection: socket.socket, fds: list[int]) -> bytes:
    """Bytes; a descriptor that came with them, now the caller's, is added to *fds*, but one alone.

    There is room for one: the kernel gives out none of the others.
    """
    while True:
        try:
            data, ancillary, *_ = connection.recvmsg(
                _READ_SIZE, _ROOM_FOR_ONE, socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            await trio.lowlevel.wait_readable(connection)
            continue
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                passed = array.array("i")
                passed.frombytes(payload[: len(payload) - len(payload) % passed.itemsize])
                fds += passed
        _close_beyond(1, fds)
        return data


def _close_beyond(count: int, fds: list[int]) -> None:
    while len(fds) > count:
        os.close(fds.pop())
