"""Clients of a resource manager, suspended and resumed at every step: none of them can tell."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
from typing import TYPE_CHECKING, Any, Final, cast

import pytest
import trio
import trio.testing

from tests.support import commands as tpm
from tests.support import managed as m
from tests.support import sockets as s
from tests.support.commands import code_of
from tests.support.kernel import FakeKernel, Jobs
from tests.support.processes import in_child
from tests.support.suspension import Host, chances, prepared
from vtpm_cuse.acquire.endpoints import Endpoints
from vtpm_cuse.proto.device import DeviceSession
from vtpm_cuse.serve.sockets import SavedSockets, SocketServer
from vtpm_cuse.vtpm.managed import ManagedFile, ManagedVtpm, SavedManagedOpen
from vtpm_cuse.vtpm.ptm import PtmService
from vtpm_cuse.vtpm.turn import Turn

if TYPE_CHECKING:
    import random
    from collections.abc import AsyncIterator, Callable, Iterable
    from pathlib import Path

    from vtpm_cuse.serve.worker import Worker

CLIENTS: Final = 3
STEPS: Final = 150
_SAVE: Final = m.save(0)[6:10]
_START: Final = m.start_session()[6:10]
_RANDOM: Final = {tpm.get_random(1)[6:10], _START, _SAVE}


class Contexts:
    """Those that clients were given, for any of them to load."""

    def __init__(self) -> None:
        self._known: list[bytes] = []

    def command(self, chance: random.Random) -> bytes:
        """Any command of a client's; whether it succeeds depends on what has been before."""
        key, session = 0x80000000 + chance.randrange(9), chance.randrange(6)
        session |= chance.choice((0x02000000, 0x03000000))
        handle = chance.choice((key, session))
        if self._known and chance.random() < 0.12:
            return m.load(chance.choice(self._known))
        return chance.choice(
            (
                *(m.load_external(chance.randrange(50)), m.load_external(chance.randrange(50))),
                *(m.read_public(key), m.flush(handle), m.save(handle), m.save(handle)),
                *(m.start_session(), m.start_session(kind=0), m.policy_digest(session)),
                *(m.policy_command_code(session, 0x15D), m.sequence_start()),
                *(m.sequence_update(key, b"data"), m.sequence_complete(key), tpm.get_random(8)),
                *(m.list_handles(0x80000000), m.list_handles(0x02000000)),
                *(m.list_handles(0x03000000), tpm.pcr_extend(10, b"1" * 32), tpm.pcr_read(10)),
            )
        )

    def seen(self, command: bytes, response: bytes) -> object:
        """What is the same without a suspension, of a response."""
        code = code_of(response)
        if command[6:10] == _SAVE and code == 0:
            self._known.append(response[10:])
        if command[6:10] in _RANDOM:
            handle = response[10:14] if command[6:10] == _START else b""
            return code, len(response), handle
        return response


# Any: JSON.
def told(managed: ManagedVtpm) -> Any:  # noqa: ANN401
    """What the owner of the TPM sees of the clients, but for the time."""
    found = json.loads(managed.describe())
    for client in found["clients"]:
        del client["connected"], client["idle"]
    return found


# -- behind a device ----------------------------------------------------------------------


class Device:
    """A managed device of the real library in memory, and its clients."""

    def __init__(self, blobs: dict[str, bytes], *, restless: bool) -> None:
        self.host = Host(blobs)
        self.jobs = Jobs()
        self._restless = restless
        self._make()
        self.kernel = FakeKernel(self.session, self._after)
        self.host.vtpm.start()
        self.host.vtpm.process(tpm.TPM2_STARTUP_CLEAR)
        self.handles = [self.opened() for _ in range(CLIENTS)]

    def _make(self) -> None:
        turn = Turn(self.jobs.submit)
        self.managed = ManagedVtpm(self.host.vtpm, clock=lambda: 1000.0)
        self.file = ManagedFile(self.host.vtpm, self.managed, turn, self._wake)
        self.session: DeviceSession[SavedManagedOpen] = DeviceSession(self.file)

    def _wake(self) -> None:
        for message in self.session.wake():
            self.kernel.take(message)

    def _after(self) -> None:
        self.file.run_pending()
        while self.jobs.waiting:
            self.jobs.run()
        if self._restless:
            saved, clients = self.session.suspend(), self.managed.suspend()
            self.host.renew()
            self._make()
            self.managed.resume(clients)
            self.session.resume(saved)
            self.kernel.session = self.session

    def opened(self) -> int:
        assert self.kernel.open().error == 0
        return self.kernel.handle

    def step(self, chance: random.Random, contexts: Contexts) -> object:
        number = chance.randrange(CLIENTS)
        self.kernel.handle = self.handles[number]
        what = chance.random()
        if what < 0.03:
            self.kernel.release()
            self.handles[number] = self.opened()
            return "another"
        if what < 0.05:
            self.host.vtpm.start()
            return code_of(self.host.vtpm.process(tpm.TPM2_STARTUP_CLEAR))
        command = contexts.command(chance)
        self.kernel.write(command)
        response = b""
        while part := self.kernel.read(chance.choice((4096, 30))).body:
            response += part
        return command[6:10], contexts.seen(command, response)


@pytest.mark.parametrize("seed", range(5))
@in_child
def test_a_managed_device_suspended_behind_every_request(seed: int) -> None:
    blobs, seen = prepared(), []
    for restless in (False, True):
        device, contexts = Device(blobs, restless=restless), Contexts()
        seen.append(
            [
                (device.step(chance, contexts), told(device.managed), *device.host.seen())
                for chance in chances(seed, STEPS)
            ]
        )
        device.host.close()
    plain, restless_ones = seen
    for number, (expected, found) in enumerate(zip(plain, restless_ones, strict=True)):
        assert found == expected, number
    assert any(one[1]["swaps"]["objects"] for one in plain)
    assert any(one[1]["swaps"]["sessions"] for one in plain)


def test_every_value_of_a_managed_open_outlives_a_suspension() -> None:
    device = Device(prepared(), restless=False)
    device.kernel.write(tpm.pcr_read(10))
    assert len(device.kernel.read(4).body) == 4
    before, clients = device.session.suspend(), device.managed.suspend()
    device._make()
    device.managed.resume(clients)
    device.session.resume(before)
    assert device.session.suspend() == before
    assert device.managed.suspend() == clients._replace(
        manager=clients.manager._replace(next_number=CLIENTS + 1)
    )
    assert before.opens[-1][2].response
    device.host.close()


# -- behind sockets -----------------------------------------------------------------------


class InlineWorker:
    """Does a job where it is given: nothing depends on a thread's pace."""

    async def run(self, job: Callable[[], bytes], _hurry: Callable[[], object]) -> bytes:
        await trio.lowlevel.checkpoint()
        return job()


class Sockets:
    """A managed socket, and its clients."""

    def __init__(self, folder: Path, blobs: dict[str, bytes], *, per_process: bool) -> None:
        folder.mkdir()
        self.host = Host(blobs)
        self.host.vtpm.start()
        self.host.vtpm.process(tpm.TPM2_STARTUP_CLEAR)
        self._path = folder / "managed"
        listener = s.listener(self._path)
        listener.setblocking(False)
        self._endpoints = Endpoints()
        self._endpoints.managed_listener = listener
        self._endpoints.per_process = per_process
        self._saved: SavedSockets | None = None
        self.ptm = PtmService(self.host.vtpm)
        self.contexts = Contexts()
        self.clients = [self.connected() for _ in range(CLIENTS)]
        self.asked: list[list[bytes]] = [[] for _ in range(CLIENTS)]

    def connected(self) -> socket.socket:
        found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        found.connect(str(self._path))
        found.setblocking(False)
        return found

    @contextlib.asynccontextmanager
    async def served(self) -> AsyncIterator[None]:
        """Meanwhile; before and behind, nothing is there but plain values."""
        worker = cast("Worker", InlineWorker())
        endpoints = self._endpoints if self._saved is None else Endpoints()
        with endpoints.epoll:
            async with trio.open_nursery() as nursery:
                if self._saved is None:
                    server = SocketServer(nursery, endpoints, self.ptm, worker)
                    server.start()
                else:
                    self.host.renew()
                    self.ptm = PtmService(self.host.vtpm)
                    server = SocketServer(nursery, endpoints, self.ptm, worker)
                    server.resume(self._saved)
                yield
                self._saved = await server.suspend()

    def act(self, chance: random.Random) -> None:
        """What clients do at once: one does anything, the others what is the same in any order."""
        busy = chance.randrange(CLIENTS)
        for number in range(CLIENTS):
            command = tpm.get_random(8)
            if number == busy:
                command = self.contexts.command(chance)
                if chance.random() < 0.05:
                    self.clients[number].close()
                    self.clients[number] = self.connected()
                    continue
            elif chance.random() < 0.5:
                continue
            self.asked[number].append(command)
            self.clients[number].send(command)

    async def look(self) -> object:
        """All that has come of it, once nothing happens any more."""
        await trio.testing.wait_all_tasks_blocked()
        seen: list[object] = []
        for client, asked in zip(self.clients, self.asked, strict=True):
            for command in asked:
                response = client.recv(10)
                rest = int.from_bytes(response[2:6], "big") - len(response)
                response += client.recv(rest) if rest else b""
                seen.append((command[6:10], self.contexts.seen(command, response)))
            asked.clear()
            with pytest.raises(BlockingIOError):
                client.recv(1)
        assert self.ptm.managed is not None
        return seen, told(self.ptm.managed), *self.host.seen()

    def close(self) -> None:
        """Both ends, and the TPM."""
        assert self._saved is not None
        assert self._saved.managed is not None
        for fd in (
            self._saved.managed.listener,
            *(one.data.fd for one in self._saved.managed.connections),
            *(one.fd for one in self._saved.managed.processes or ()),
        ):
            os.close(fd)
        for client in self.clients:
            client.close()
        self.host.close()


async def _serve(served: Sockets, steps: Iterable[random.Random], *, restless: bool) -> list[Any]:
    seen = []
    if restless:
        for number, chance in enumerate(steps):
            async with served.served():
                served.act(chance)
                for _ in range(number % 6):  # as far as the server gets in that time
                    await trio.lowlevel.checkpoint()
            async with served.served():
                seen.append(await served.look())
    else:
        async with served.served():
            await trio.testing.wait_all_tasks_blocked()
            for chance in steps:
                served.act(chance)
                seen.append(await served.look())
    return seen


@pytest.mark.parametrize(("seed", "per_process"), [(0, False), (1, False), (2, True)])
@in_child
def test_a_managed_socket_suspended_at_every_step(
    seed: int, per_process: bool, tmp_path: Path
) -> None:
    blobs, runs = prepared(), []
    for restless in (False, True):
        served = Sockets(tmp_path / str(restless), blobs, per_process=per_process)
        run = functools.partial(_serve, served, list(chances(seed, STEPS)), restless=restless)
        runs.append(trio.run(run, clock=trio.testing.MockClock()))
        served.close()
    for number, (expected, found) in enumerate(zip(*runs, strict=True)):
        assert found == expected, number
    assert any(one[1]["swaps"]["objects"] for one in runs[0])
