"""Both channels of one `swtpm socket` under 100,000 bad and good messages, seeded.

The server must go on answering, keep no descriptor, not grow, and have nothing to say that
ends in a traceback. Clients shout: they send several messages on a connection, read what
comes when they feel like it, and vanish in the middle.
"""

from __future__ import annotations

import contextlib
import random
import socket
from typing import TYPE_CHECKING, Final

import pytest

from tests.fuzz.harness import mutated
from tests.support import commands as tpm
from tests.support import sockets as s
from tests.support.sockets import Server, u32
from vtpm_cuse.proto.control import ControlStream
from vtpm_cuse.proto.stream import CommandStream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SEED: Final = 20261121
MESSAGES: Final = {True: 39_000, False: 13_000}
"""For each channel, by "is it a TPM 2"."""

PER_CONNECTION: Final = 40
GROWTH_KIB: Final = 24 << 10
"""Generous: a leak of one kilobyte for each message would be four times that."""

TPM2_SEEDS: Final = (
    tpm.TPM2_STARTUP_CLEAR,
    tpm.TPM2_SHUTDOWN_STATE,
    tpm.TPM2_READ_CLOCK,
    tpm.get_random(16),
    tpm.pcr_read(3),
    tpm.pcr_extend(3, bytes(32)),
    tpm.nv_read(tpm.NV_INDEX, 8),
    tpm.tpm2(0x17A, u32(6, 0x100, 9)),
    u32(8) + b"\0" + u32(12) + tpm.get_random(4),
)
TPM12_SEEDS: Final = (
    tpm.TPM12_STARTUP_CLEAR,
    tpm.tpm12(0x46, u32(16)),
    tpm.tpm12_pcr_read(3),
    tpm.tpm12_pcr_extend(3, bytes(20)),
    tpm.tpm12_nv_read(0x1101, 8),
    tpm.tpm12(0x65, u32(6, 0)),
)
CONTROL_SEEDS: Final = (
    u32(s.GET_CAPABILITY),
    u32(s.INIT, 0),
    u32(s.GET_TPMESTABLISHED),
    u32(s.SET_LOCALITY) + b"\0",
    u32(s.HASH_START),
    u32(s.HASH_DATA, 3) + b"abc",
    u32(s.HASH_END),
    u32(s.CANCEL_TPM_CMD),
    u32(s.RESET_TPMESTABLISHED) + b"\3\0\0\0",
    u32(s.GET_STATEBLOB, 1, 1, 0),
    u32(s.GET_STATEBLOB, 1, 9, 0),
    u32(s.SET_STATEBLOB, 0, 1, 4) + b"blob",
    u32(s.STOP),
    u32(s.GET_CONFIG),
    u32(s.SET_DATAFD),
    u32(s.SET_BUFFERSIZE, 0),
    u32(s.GET_INFO, 0, 7, 0, 0),
    u32(99),
)
LASTING: Final = (u32(s.SHUTDOWN), u32(s.LOCK_STORAGE))
"""What must not be hit by chance: the end of the server, and retries for years."""

LONG_CODES: Final = (0x131, 0x153, 0x191, 0x124, 0x125, 0x126, 0x0D, 0x1F, 0x78, 0x79, 0x7F)
"""Commands that make keys or begin anew: correct, but slow."""


def data_messages(chance: random.Random, *, tpm2: bool) -> Iterator[bytes]:
    seeds = TPM2_SEEDS if tpm2 else TPM12_SEEDS
    slow = [code.to_bytes(4, "big") for code in LONG_CODES]
    while True:
        message = mutated(chance, chance.choice(seeds))
        if not any(code in message for code in slow):
            yield message


def control_messages(chance: random.Random, *, tpm2: bool) -> Iterator[bytes]:
    while True:
        message = mutated(chance, chance.choice(CONTROL_SEEDS))
        if message[:4] == u32(s.INIT) and not tpm2 and chance.randrange(4):
            continue  # a TPM 1.2 takes a tenth of a second for its self-test
        if message[:4] not in LASTING:
            yield message


class Fuzzer:
    """Clients of one server; what a request is and what not, our own sans-IO code tells."""

    def __init__(self, server: Server, *, tpm2: bool) -> None:
        self._server, self._tpm2 = server, tpm2
        self._chance = random.Random(SEED)  # noqa: S311 - repeatable, not secret
        self._data = data_messages(self._chance, tpm2=tpm2)
        self._control = control_messages(self._chance, tpm2=tpm2)
        self.sent = 0
        self.answered = 0

    def play(self, count: int) -> None:
        """Sends *count* messages to each channel; most clients wait for their answers."""
        goal = self.sent + 2 * count
        while self.sent < goal:
            if self._chance.randrange(10):
                with self._server.data() as data, self._server.control() as control:
                    self._talk(data, control)
            else:
                self._shout(self._server.data, self._data)
                self._shout(self._server.control, self._control)

    def _talk(self, data: s.Client, control: s.Client) -> None:
        """In turns on both channels; every request is answered, once."""
        commands, requests = CommandStream(prefix=self._tpm2), ControlStream()
        for _ in range(self._chance.randrange(1, PER_CONNECTION)):
            self._send(data, commands, next(self._data))
            while request := commands.next_request():
                hear_response(data, prefixed=request.locality is not None)
                self.answered += 1
            self._send(control, requests, next(self._control))
            if requests.next_request():
                assert control.socket.recv(1 << 20)
                self.answered += 1
                while s.readable(control.socket):  # the rest of a long answer, or the end
                    if not control.socket.recv(1 << 20):
                        return
            if commands.awaits_rest or requests.pressing or requests.broken:
                break
        if self._chance.randrange(2):  # else both vanish, perhaps in the middle
            for client in (data, control):
                client.socket.shutdown(socket.SHUT_WR)
                client.rest()

    def _send(
        self, client: s.Client, stream: CommandStream | ControlStream, message: bytes
    ) -> None:
        client.send(message)
        stream.feed(message)
        self.sent += 1

    def _shout(self, connect: Callable[[], s.Client], messages: Iterator[bytes]) -> None:
        """Sends without listening, so that several come in one read, then vanishes."""
        with connect() as client, contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(self._chance.randrange(1, PER_CONNECTION)):
                self.sent += 1
                client.send(next(messages))


def hear_response(client: s.Client, *, prefixed: bool) -> None:
    length = int.from_bytes(client.exactly(4), "big") if prefixed else None
    response = client.response()
    if prefixed:
        assert length == len(response)
        assert client.exactly(4) == bytes(4)


@pytest.mark.parametrize("tpm2", [True, False], ids=["tpm2", "tpm12"])
def test_both_channels(tpm2: bool, tmp_path: Path) -> None:
    with Server(tmp_path, *s.RUNNING, tpm2=tpm2) as server:
        fuzzer, part = Fuzzer(server, tpm2=tpm2), MESSAGES[tpm2] // 13
        fuzzer.play(part)  # memory and descriptors are at their level now
        check_alive(server, tpm2=tpm2)
        descriptors, resident = server.descriptors(), server.resident_kib()
        for _ in range(12):
            fuzzer.play(part)
            check_alive(server, tpm2=tpm2)
        assert fuzzer.sent >= 2 * MESSAGES[tpm2]
        assert fuzzer.answered > fuzzer.sent // 2
        server.settle(descriptors)
        assert server.resident_kib() - resident < GROWTH_KIB
        assert server.request(s.SHUTDOWN) == bytes(4)
        assert server.wait() == 0
        assert "Traceback" not in server.log_text()


def check_alive(server: Server, *, tpm2: bool) -> None:
    """Still itself: it resets, starts up and answers."""
    with server.control() as control, server.data() as data:
        assert control.result(s.SET_LOCALITY, b"\0") == 0
        assert control.result(s.STOP) == 0
        for kind in (s.PERMANENT, s.VOLATILE, s.SAVESTATE):
            assert control.set_blob(kind, b"") == 0
        assert control.control(s.SET_BUFFERSIZE, u32(4096), 16)[4:8] == u32(4096)
        assert control.result(s.INIT, u32(1)) == 0
        startup = tpm.TPM2_STARTUP_CLEAR if tpm2 else tpm.TPM12_STARTUP_CLEAR
        assert tpm.code_of(data.command(startup)) == 0
        assert tpm.code_of(data.command(tpm.pcr_read(3) if tpm2 else tpm.tpm12_pcr_read(3))) == 0


def test_thousands_of_connections(tmp_path: Path) -> None:
    """Some say something, some half of it, some nothing; none stays."""
    chance = random.Random(SEED)  # noqa: S311 - repeatable, not secret
    command = tpm.get_random(8)
    with Server(tmp_path, *s.RUNNING) as server:
        check_alive(server, tpm2=True)
        descriptors, resident = server.descriptors(), server.resident_kib()
        for _ in range(2000):
            with server.data() as client:
                client.send(command[: chance.randrange(len(command) + 1)])
            with server.control() as client:
                client.send(u32(s.SET_LOCALITY, 0)[: chance.randrange(9)])
        server.settle(descriptors)
        assert server.resident_kib() - resident < GROWTH_KIB
        check_alive(server, tpm2=True)
        assert "Traceback" not in server.log_text()


def test_client_that_never_reads(tmp_path: Path) -> None:
    """It is not waited for by the control channel, nor at the end."""
    with Server(tmp_path, *s.RUNNING) as server, server.data() as deaf, server.control() as mute:
        for client, message in ((deaf, tpm.get_random(32)), (mute, u32(s.GET_INFO, 0, 7, 0, 0))):
            client.socket.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    client.socket.send(message)
        assert len(server.request(s.GET_CAPABILITY, size=8)) == 8
        server.process.terminate()
        assert server.wait() == 0


def test_slow_clients(tmp_path: Path) -> None:
    """Many at a time, each a byte now and then, in an order that nobody chose."""
    chance = random.Random(SEED)  # noqa: S311 - repeatable, not secret
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(Server(tmp_path, *s.RUNNING))
        data = stack.enter_context(server.data())
        slow = [stack.enter_context(server.control()) for _ in range(20)]
        rest = {client: list(u32(s.GET_CONFIG)) for client in slow}
        rest[data] = list(tpm.get_random(8))
        order = [client for client, message in rest.items() for _ in message]
        chance.shuffle(order)
        for client in order:
            client.send(bytes([rest[client].pop(0)]))
        for client in slow:
            assert client.answer(8) == bytes(8)
        assert tpm.code_of(data.response()) == 0
