"""Many managed clients and their one reader: what some do while the TPM has a command of another.

The reader looks for more as soon as that is answered, and finds it all at once.
"""

from __future__ import annotations

import json
import socket
from typing import TYPE_CHECKING, Final, cast

import pytest
import trio
import trio.testing

from tests.support import commands as tpm
from tests.support import managed as m
from tests.support import sockets as s
from tests.support.commands import code_of
from tests.support.suspension import Host, prepared
from vtpm_cuse.acquire.endpoints import Endpoints
from vtpm_cuse.engine.libtpms import LibtpmsEngine
from vtpm_cuse.serve.sockets import SocketServer
from vtpm_cuse.vtpm.managed import ManagedVtpm
from vtpm_cuse.vtpm.ptm import PtmService

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from pathlib import Path

    from vtpm_cuse.serve.worker import Worker
    from vtpm_cuse.vtpm.clients import Client

    Scenario = Callable[["World"], Awaitable[None]]

CLIENTS: Final = 3
FLOOD: Final = 150
"""Answers that a socket has room for."""
BETWEEN_CHECKPOINTS: Final = 64
"""Commands, and more than that."""


def numbered(number: int) -> bytes:
    """A command that tells in the TPM who gave it."""
    return tpm.get_random(number)


class HeldWorker:
    """Begins a long command when the test says so."""

    def __init__(self) -> None:
        self.has_one, self.may_begin = trio.Event(), trio.Event()

    async def run(self, job: Callable[[], bytes], _abort: Callable[[], object]) -> bytes:
        self.has_one.set()
        await self.may_begin.wait()
        return job()


class World:
    """A server and its clients, in one thread.

    Attributes:
        given: All commands that the TPM has been given.
        meanwhile: What happens while the TPM has the next commands, one each.
    """

    def __init__(self, host: Host, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.given: list[bytes] = []
        self.meanwhile: list[Callable[[], object]] = []
        self.clients: list[socket.socket] = []
        self.clock = trio.testing.MockClock()
        self._path = folder / "managed"
        self._ptm = PtmService(host.vtpm)
        process = LibtpmsEngine.process

        def watched(engine: LibtpmsEngine, command: bytes) -> bytes:
            self.given.append(command)
            if self.meanwhile:
                self.meanwhile.pop(0)()
            return process(engine, command)

        monkeypatch.setattr(LibtpmsEngine, "process", watched)

    def serve(self, scenario: Scenario) -> None:
        """Runs it, with clients that have had a command each."""
        with s.listener(self._path) as listening:
            listening.setblocking(False)
            trio.run(self._serve, listening, scenario, clock=self.clock)
        self.meanwhile.clear()
        for client in self.clients:
            client.close()

    async def _serve(self, listening: socket.socket, scenario: Scenario) -> None:
        self.worker = HeldWorker()
        endpoints = Endpoints()
        endpoints.managed_listener = listening
        async with trio.open_nursery() as nursery:
            worker = cast("Worker", self.worker)
            SocketServer(nursery, endpoints, self._ptm, worker).start()
            for number in range(CLIENTS):
                self.connect().send(numbered(number + 1))
            assert await self.lengths() == [[1], [2], [3]]
            self.given.clear()
            await scenario(self)
            nursery.cancel_scope.cancel()
        endpoints.epoll.close()

    def connect(self) -> socket.socket:
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        client.connect(str(self._path))
        client.setblocking(False)
        self.clients.append(client)
        return client

    async def answers(self) -> list[list[bytes]]:
        """What each client is sent, once nothing happens any more."""
        await trio.testing.wait_all_tasks_blocked()
        return [list(responses(client)) for client in self.clients]

    async def lengths(self) -> list[list[int]]:
        """Of the random numbers in those answers, which must be successes."""
        found = await self.answers()
        assert all(code_of(answer) == 0 for answers in found for answer in answers)
        return [[len(answer) - 12 for answer in answers] for answers in found]

    def managed(self) -> int:
        """How many clients there are for the manager."""
        assert self._ptm.managed is not None
        return len(json.loads(self._ptm.managed.describe())["clients"])


def responses(client: socket.socket) -> Iterator[bytes]:
    if client.fileno() < 0:
        return
    try:
        data = client.recv(1 << 20)
    except BlockingIOError:
        return
    if not data:
        yield m.u32(0, 0, 0)  # the end, which no response looks like
    while data:
        size = int.from_bytes(data[2:6], "big")
        yield data[:size]
        data = data[size:]


@pytest.fixture(scope="module")
def blobs() -> dict[str, bytes]:
    return prepared()


@pytest.fixture
def world(
    blobs: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[World]:
    host = Host(blobs)
    host.vtpm.start()
    assert code_of(host.vtpm.process(tpm.TPM2_STARTUP_CLEAR)) == 0
    yield World(host, tmp_path, monkeypatch)
    host.close()


def flood(world: World, client: socket.socket, count: int) -> None:
    """With each command that the TPM has, the next one comes."""
    if count:
        client.send(numbered(20))
        world.meanwhile.append(lambda: flood(world, client, count - 1))


def test_who_floods_leaves_each_other_its_turn(world: World) -> None:
    async def scenario(world: World) -> None:
        one, other, third = world.clients
        flood(world, one, FLOOD)
        world.meanwhile.append(lambda: (other.send(numbered(21)), third.send(numbered(22))))
        found = await world.lengths()
        assert found == [[20] * FLOOD, [21], [22]]
        early = [command for command in world.given[:6] if command != numbered(20)]
        assert sorted(early) == [numbered(21), numbered(22)]

    world.serve(scenario)


def test_who_floods_alone_does_not_keep_others_from_coming(world: World) -> None:
    async def scenario(world: World) -> None:
        for client in world.clients[1:]:
            client.close()
        assert await world.lengths() == [[], [], []]
        flood(world, world.clients[0], FLOOD)
        world.meanwhile.append(lambda: world.connect().send(numbered(21)))
        assert await world.lengths() == [[20] * FLOOD, [], [], [21]]
        assert numbered(21) in world.given[:BETWEEN_CHECKPOINTS]

    world.serve(scenario)


def test_many_commands_at_once_are_answered_in_turn(world: World) -> None:
    """Of one client in their order, and none of another waits for all of them."""

    async def scenario(world: World) -> None:
        one, other, _ = world.clients
        one.send(b"".join(numbered(1 + number % 32) for number in range(FLOOD)))
        other.send(numbered(40))
        found = await world.lengths()
        assert found == [[1 + number % 32 for number in range(FLOOD)], [40], []]
        assert numbered(40) in world.given[:BETWEEN_CHECKPOINTS]

    world.serve(scenario)


def test_who_reads_late_is_told_all_and_nobody_else_waits(world: World) -> None:
    async def scenario(world: World) -> None:
        one, other, _ = world.clients
        flood(world, one, 8 * FLOOD)
        for number in (21, 22, 23):
            await trio.testing.wait_all_tasks_blocked()
            assert len(world.given) < 8 * FLOOD
            other.send(numbered(number))
        await trio.testing.wait_all_tasks_blocked()
        assert [len(answer) - 12 for answer in responses(other)] == [21, 22, 23]
        told = 0
        while (found := await world.lengths())[0]:
            assert found == [[20] * len(found[0]), [], []]
            told += len(found[0])
        assert told == 8 * FLOOD

    world.serve(scenario)


def test_one_ends_meanwhile(world: World) -> None:
    async def scenario(world: World) -> None:
        one, other, third = world.clients
        world.meanwhile += other.close, lambda: third.send(numbered(23))
        one.send(numbered(20))
        one.send(numbered(21))
        assert await world.lengths() == [[20, 21], [], [23]]
        assert world.managed() == 2
        one.send(numbered(24))
        assert await world.lengths() == [[24], [], []]

    world.serve(scenario)


@pytest.mark.parametrize("there", [1, 7, 10, 11])
def test_half_a_command_comes_meanwhile(there: int, world: World) -> None:
    async def scenario(world: World) -> None:
        one, other, third = world.clients
        world.meanwhile.append(lambda: (other.send(numbered(22)[:there]), third.send(numbered(23))))
        one.send(numbered(21))
        assert await world.lengths() == [[21], [], [23]]
        one.send(numbered(24))
        assert await world.lengths() == [[24], [], []]
        world.meanwhile.append(lambda: other.send(numbered(22)[there:]))
        one.send(numbered(25))
        assert await world.lengths() == [[25], [22], []]
        other.send(numbered(26))
        assert await world.lengths() == [[], [26], []]

    world.serve(scenario)


def test_the_rest_of_a_command_never_comes(world: World) -> None:
    """The TPM says what it makes of what is there; who sent it goes on."""

    async def scenario(world: World) -> None:
        one, other, _ = world.clients
        world.meanwhile.append(lambda: other.send(numbered(22)[:-1]))
        one.send(numbered(21))
        assert await world.lengths() == [[21], [], []]
        world.clock.jump(2)
        ((), (refusal,), ()) = await world.answers()
        assert code_of(refusal) != 0
        other.send(numbered(24))
        assert await world.lengths() == [[], [24], []]

    world.serve(scenario)


def test_a_long_command_comes_meanwhile(world: World) -> None:
    """Nobody is answered beside it, everybody behind it; who goes is not missed."""

    async def scenario(world: World) -> None:
        one, other, third = world.clients
        long = tpm.create_primary_rsa(bits=1024)
        world.meanwhile.append(lambda: (other.send(long), third.send(numbered(23))))
        one.send(numbered(21))
        await world.worker.has_one.wait()
        one.send(numbered(24))
        other.send(numbered(25))
        assert (await world.answers())[1] == []
        assert long not in world.given
        third.close()
        await trio.testing.wait_all_tasks_blocked()
        world.worker.may_begin.set()
        (mine, (made, theirs), _) = await world.answers()
        assert [len(answer) - 12 for answer in (*mine, theirs)] == [24, 25]
        assert m.handle_of(made) == 0x80000000
        assert world.managed() == 2

    world.serve(scenario)


def test_a_fault_of_ours_costs_one_its_connection(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = ManagedVtpm.process_known

    def faulty(managed: ManagedVtpm, client: Client, command: bytes) -> bytes | None:
        if command == numbered(22):
            raise ArithmeticError
        return known(managed, client, command)

    monkeypatch.setattr(ManagedVtpm, "process_known", faulty)

    async def scenario(world: World) -> None:
        one, other, third = world.clients
        world.meanwhile.append(lambda: (other.send(numbered(22)), third.send(numbered(23))))
        one.send(numbered(21))
        ((mine,), (end,), (theirs,)) = await world.answers()
        assert end == m.u32(0, 0, 0)
        assert [len(mine), len(theirs)] == [12 + 21, 12 + 23]
        one.send(numbered(24))
        assert (await world.lengths())[0] == [24]

    world.serve(scenario)
