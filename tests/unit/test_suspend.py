"""A vTPM and what serves it, suspended and resumed at every step: no client can tell.

On the real library, one TPM after the other; what differs are the random numbers.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import socket
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Final, cast

import pytest
import trio
import trio.testing

from tests.support import commands as tpm
from tests.support import ptm
from tests.support import sockets as s
from tests.support.engine import FakeEngine, echo
from tests.support.kernel import FakeKernel, Jobs, Reply
from tests.support.processes import in_child
from tests.support.ptm import u32
from tests.support.stores import FailingStore
from tests.support.suspension import SCRIPT, Host, chances, command_of, masked, prepared
from tests.support.waiting import PATIENCE_SECONDS
from vtpm_cuse.acquire.endpoints import Endpoints
from vtpm_cuse.errors import DeviceError, EngineError, VtpmError
from vtpm_cuse.proto.control import ControlRequest, SavedControlStream
from vtpm_cuse.proto.device import DeviceSession
from vtpm_cuse.proto.places import PLACES, SavedPlace
from vtpm_cuse.proto.stream import Request
from vtpm_cuse.serve.connections import (
    ControlConnection,
    DataConnection,
    SavedControl,
    SavedData,
)
from vtpm_cuse.serve.sockets import SavedSockets, SocketServer
from vtpm_cuse.serve.worker import Worker
from vtpm_cuse.storage.sealed import SealedStore
from vtpm_cuse.vtpm.file import SavedOpen, TpmDeviceFile
from vtpm_cuse.vtpm.ptm import PtmService
from vtpm_cuse.vtpm.saved import SavedVtpm
from vtpm_cuse.vtpm.turn import Turn
from vtpm_cuse.vtpm.vtpm import Vtpm, VtpmOptions
from vtpm_cuse.wire.ptm import PtmCommand

if TYPE_CHECKING:
    from pathlib import Path


SEEDS: Final = range(12)
STEPS: Final = 80
LONG: Final = tpm.create_primary_rsa()


# -- the vTPM alone -----------------------------------------------------------------------


def test_every_value_outlives_a_suspension() -> None:
    saved = SavedVtpm(
        whose="handed out",
        running=True,
        volatile=b"volatile",
        locality=3,
        buffer_size=3000,
        last_header=b"\x80\x01\0\0\0\x0c\0\0\1\x45",
        hashing=True,
        failure_said=True,
        profile='{"Name":"x"}',
        given=(("permall", b"p"), ("savestate", None)),
        audit=0x02000001,
    )
    engine = FakeEngine()
    vtpm = Vtpm(engine, SealedStore(FailingStore()))
    vtpm.resume(saved)
    assert engine.given == {"permall": b"p", "savestate": None, "volatilestate": b"volatile"}
    assert engine.calls[-1] == "start"
    assert vtpm.suspend() == saved
    assert not engine.running
    assert engine.commands == []  # no TPM2_Shutdown


def test_one_that_is_off_outlives_it_too() -> None:
    vtpm = Vtpm(FakeEngine(), None, VtpmOptions(incoming=True, profile="{}"))
    saved = vtpm.suspend()
    assert saved == SavedVtpm("incoming", False, b"", 0, 4096, b"", False, False, "{}", (), 0)
    engine = FakeEngine()
    resumed = Vtpm(engine, None)
    resumed.resume(saved)
    assert "start" not in engine.calls
    assert resumed.suspend() == saved


def test_a_tpm_that_cannot_be_saved_runs_on() -> None:
    engine = FakeEngine()
    vtpm = Vtpm(engine, SealedStore(FailingStore()))
    vtpm.start()
    engine.faults["volatile_state"] = EngineError("TPMLIB_VolatileAll_Store", 9)
    with pytest.raises(EngineError):
        vtpm.suspend()
    assert vtpm.running


@pytest.mark.parametrize("tpm2", [True, False], ids=["tpm2", "tpm12"])
@in_child
def test_no_new_tpm_begins_where_the_state_has_gone(tpm2: bool) -> None:
    host = Host({}, tpm2=tpm2)
    host.vtpm.start()
    saved = host.vtpm.suspend()
    host.close()
    other = Host({}, tpm2=tpm2)
    with pytest.raises(VtpmError):
        other.vtpm.resume(saved)
    assert not other.vtpm.running
    assert other.store.blobs == {}


@in_child
def test_a_tpm12_outlives_a_suspension() -> None:
    blobs = prepared(tpm2=False)
    script = (
        *(tpm.TPM12_STARTUP_CLEAR, tpm.tpm12_pcr_extend(10, b"1" * 20), tpm.tpm12_pcr_read(10)),
        *(tpm.tpm12(0xA0), tpm.tpm12(0xA1, b"\0\0\0\x40" + b"a" * 64), tpm.tpm12_pcr_read(10)),
        *(tpm.tpm12(0xA0), tpm.tpm12(0xA1, b"\0\0\0\x40" + b"a" * 64)),
        *(tpm.tpm12(0xA2, b"\0\0\0\3abc"), tpm.tpm12_pcr_read(10)),
    )

    def run(after: Callable[[Host], None]) -> list[object]:
        host = Host(blobs, tpm2=False)
        seen: list[object] = []
        host.vtpm.start()
        for command in script:
            seen.append((host.vtpm.process(command), _asked(host.vtpm), *host.seen()))
            after(host)
        host.close()
        return seen

    assert run(Host.renew) == run(lambda _: None)


# -- behind a device ----------------------------------------------------------------------


class Device:
    """A device of the real library in memory; long commands are done when they are given."""

    restless = False

    def __init__(self, blobs: dict[str, bytes]) -> None:
        self.host = Host(blobs)
        self.jobs = Jobs()
        self._make()
        self.kernel = FakeKernel(self.session, self._after)
        self.exported: dict[int, bytes] = {}

    def _make(self) -> None:
        vtpm = self.host.vtpm
        self.file = TpmDeviceFile(vtpm, PtmService(vtpm), Turn(self.jobs.submit), self._wake)
        self.session: DeviceSession[SavedOpen] = DeviceSession(self.file)

    def _wake(self) -> None:
        for message in self.session.wake():
            self.kernel.take(message)

    def _after(self) -> None:
        if self.file.pending is not None:
            self.file.run_pending()
        while self.jobs.waiting:
            self.jobs.run()
        if self.restless:
            self._renew()

    def _renew(self) -> None:
        saved, response = self.session.suspend(), bytes(self.file.response)
        self.host.renew()
        self._make()
        self.file.response = memoryview(response)
        self.session.resume(saved)
        self.kernel.session = self.session


class RestlessDevice(Device):
    restless = True


def _asked(vtpm: Vtpm) -> object:
    """What the texts beside a device would show."""
    command = tpm.pcr_read(16) if vtpm.tpm2 else tpm.tpm12_pcr_read(16)
    try:
        return vtpm.query(command)
    except DeviceError as exc:
        return exc.errno
    except VtpmError as exc:
        return str(exc)


def device_step(device: Device, chance: random.Random) -> object:
    """One thing that a client of a device may do, and all that can be seen of it."""
    kernel = device.kernel

    def ioctl(number: int, argument: bytes = b"") -> Reply | None:
        return kernel.result(kernel.start_ioctl(number, argument))

    kind = chance.choice(("command",) * 6 + ("power",) * 2 + ("hash", "ioctl", "blob", "move"))
    match kind:
        case "command":
            return exchange(kernel, command_of(chance), chance.choice((4096, 4096, 7)))
        case "power":
            return [
                ioctl(ptm.STOP) if chance.random() < 0.5 else None,
                ioctl(ptm.INIT, u32(chance.randrange(2))),
                exchange(kernel, chance.choice((tpm.TPM2_STARTUP_STATE, tpm.TPM2_STARTUP_CLEAR))),
            ]
        case "hash":
            data = u32(3) + b"abc"
            return [ioctl(ptm.HASH_START), ioctl(ptm.HASH_DATA, data), ioctl(ptm.HASH_END)][
                : chance.randrange(1, 4)
            ]
        case "ioctl":
            return ioctl(
                chance.choice(
                    (
                        *(ptm.GET_TPMESTABLISHED, ptm.SET_LOCALITY, ptm.RESET_TPMESTABLISHED),
                        *(ptm.STORE_VOLATILE, ptm.SET_BUFFERSIZE, ptm.GET_CONFIG),
                        *(ptm.LOCK_STORAGE, ptm.GET_INFO),
                    )
                ),
                u32(chance.choice((0, 1, 3, 4, 5, 3500))),
            )
        case "blob":
            for blob in (ptm.PERMANENT, ptm.VOLATILE):
                device.exported[blob] = _exported(kernel, blob)
            return [bool(blob) for blob in device.exported.values()]
    return _move(device, ioctl, chance)


def exchange(kernel: FakeKernel, command: bytes, size: int = 4096) -> object:
    """A command, and its response in one piece or many."""
    kernel.write(command)
    response = b""
    while part := kernel.read(size).body:
        response += part
    return masked(command, response)


def _exported(kernel: FakeKernel, kind: int) -> bytes:
    got, total = b"", 1
    while len(got) < total:
        result, _, total, part = ptm.get_blob(kernel, kind, len(got))
        if result:
            return b""
        got += part
    return got


def _move(
    device: Device, ioctl: Callable[[int, bytes], Reply | None], chance: random.Random
) -> object:
    """What was handed out comes back, in parts, and is started from, or not."""
    seen: list[object] = [ioctl(ptm.STOP, b"")]
    for kind, blob in sorted(device.exported.items()):
        for start in range(0, len(blob) + 1, ptm.PART):
            part = blob[start : start + ptm.PART]
            seen.append(ptm.set_blob(device.kernel, kind, part))
    if chance.random() < 0.8:
        seen.append(ioctl(ptm.INIT, u32(0)))
    return [*seen, exchange(device.kernel, tpm.pcr_read(10))]


def both_devices(steps: Callable[[Device], Iterable[object]]) -> None:
    """The same is seen of a device that is suspended behind every request as of one that is not."""
    blobs = prepared()
    seen = []
    for kind in (Device, RestlessDevice):
        device = kind(blobs)
        assert device.kernel.open().error == 0
        seen.append(
            [(step, _asked(device.host.vtpm), *device.host.seen()) for step in steps(device)]
        )
        device.host.close()
    plain, restless = seen
    assert len(plain) >= len(SCRIPT)
    for number, (expected, found) in enumerate(zip(plain, restless, strict=True)):
        assert found == expected, number


@pytest.mark.parametrize("seed", SEEDS)
@in_child
def test_a_device_suspended_behind_every_request(seed: int) -> None:
    def steps(device: Device) -> Iterable[object]:
        yield device_step(device, random.Random(seed))  # noqa: S311
        device.kernel.ioctl(ptm.INIT, u32(0))
        exchange(device.kernel, tpm.TPM2_STARTUP_CLEAR)
        for chance in chances(seed, STEPS):
            yield device_step(device, chance)

    both_devices(steps)


@in_child
def test_what_a_device_has_to_lose_outlives_a_suspension() -> None:
    def steps(device: Device) -> Iterable[object]:
        kernel = device.kernel
        yield kernel.ioctl(ptm.SET_BUFFERSIZE, u32(3500))
        yield kernel.ioctl(ptm.INIT, u32(0))
        for command in SCRIPT:
            yield exchange(kernel, command)
        for blob in (ptm.PERMANENT, ptm.VOLATILE):
            device.exported[blob] = _exported(kernel, blob)
        yield kernel.ioctl(ptm.HASH_START)
        yield kernel.ioctl(ptm.HASH_DATA, u32(3) + b"abc")
        yield kernel.ioctl(ptm.HASH_END)
        yield exchange(kernel, tpm.pcr_read(17))
        for last in (tpm.TPM2_SHUTDOWN_CLEAR, tpm.pcr_read(10)):
            yield exchange(kernel, last)
            yield kernel.ioctl(ptm.STOP)
            yield kernel.ioctl(ptm.INIT, u32(0))
            yield exchange(kernel, tpm.TPM2_STARTUP_STATE)
            yield exchange(kernel, tpm.TPM2_STARTUP_CLEAR)
        yield _move(device, lambda n, a: kernel.ioctl(n, a), random.Random(1))  # noqa: S311
        yield exchange(kernel, tpm.pcr_read(10))

    both_devices(steps)


# -- behind sockets -----------------------------------------------------------------------


class InlineWorker:
    """Does a job where it is given: nothing depends on a thread's pace."""

    async def run(self, job: Callable[[], bytes], _hurry: Callable[[], object]) -> bytes:
        await trio.lowlevel.checkpoint()
        return job()

    async def insist(self, _hurry: Callable[[], object]) -> None:
        """No job runs beside anything."""


_END: Final = b"(end)"


class Sockets:
    """A served TPM and its clients: how they come to their connections is the *way*."""

    def __init__(self, way: str, folder: Path, blobs: dict[str, bytes]) -> None:
        self.host = Host(blobs)
        self.clock = trio.testing.MockClock()
        self._way, self._folder = way, folder
        self.endpoints = Endpoints()
        self.controls: list[socket.socket] = []
        self.data: socket.socket | None = None
        self._saved: SavedSockets | None = None
        if way == "listeners":
            self.endpoints.data_listener = _listener(folder / "data")
            self.endpoints.control_listener = _listener(folder / "ctrl")
            self.connect_control()
            self.connect_data()
            return
        ours, self.endpoints.control_stream = _pair()
        self.controls.append(ours)
        if way == "streams":
            self.data, self.endpoints.data_stream = _pair()

    def connect_control(self) -> None:
        """One more client, where it can."""
        if self._way == "listeners":
            self.controls.append(_connected(self._folder / "ctrl"))

    def connect_data(self) -> None:
        """A new data client in the place of the old, where it can."""
        if self._way == "listeners":
            if self.data is not None:
                self.data.close()
            self.data = _connected(self._folder / "data")
        elif self._way == "passed" and self.data is None:
            self.data, theirs = _pair()
            with theirs:
                message = s.u32(s.SET_DATAFD)
                socket.send_fds(self.controls[0], [message[:3]], [theirs.fileno()])
                self.controls[0].send(message[3:])

    async def received(self) -> list[bytes]:
        """All that each client has been sent, once nothing happens any more."""
        clients = [*self.controls, *([self.data] if self.data else [])]
        got = [b"" for _ in clients]
        while True:
            await trio.testing.wait_all_tasks_blocked()
            found = [
                b"" if before.endswith(_END) else _available(client)
                for client, before in zip(clients, got, strict=True)
            ]
            if not any(found):
                break
            got = [before + more for before, more in zip(got, found, strict=True)]
        for client, all_of_it in zip(clients, got, strict=True):
            if all_of_it.endswith(_END):
                self._forget(client)
        return got

    def _forget(self, client: socket.socket) -> None:
        client.close()
        if client is self.data:
            self.data = None
        else:
            self.controls.remove(client)

    @contextlib.asynccontextmanager
    async def served(self) -> AsyncIterator[None]:
        """Meanwhile clients are served; before and behind, nothing is there but plain values."""
        worker = cast("Worker", InlineWorker())
        async with trio.open_nursery() as nursery:
            if self._saved is None:
                server = SocketServer(nursery, self.endpoints, PtmService(self.host.vtpm), worker)
                server.start()
            else:
                self.host.renew()
                server = SocketServer(nursery, Endpoints(), PtmService(self.host.vtpm), worker)
                server.resume(self._saved)
            yield
            self._saved = await server.suspend()

    def close(self) -> None:
        """Both ends, and the TPM."""
        assert self._saved is not None
        for fd in _descriptors(self._saved):
            os.close(fd)
        for client in (*self.controls, *([self.data] if self.data else [])):
            client.close()
        self.host.close()


def _descriptors(saved: SavedSockets) -> Iterator[int]:
    for listener in (saved.data_listener, saved.control_listener):
        if listener is not None:
            yield listener
    yield from (one.fd for one in (saved.only, saved.accepted, *saved.passed) if one is not None)
    for control in saved.controls:
        yield from (control.fd, *control.passed)


def _pair() -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.setblocking(False)
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # a few responses
    return ours, theirs


def _listener(path: Path) -> socket.socket:
    found = s.listener(path)
    found.setblocking(False)
    return found


def _connected(path: Path) -> socket.socket:
    found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    found.connect(str(path))
    found.setblocking(False)
    return found


def _available(client: socket.socket) -> bytes:
    try:
        return client.recv(1 << 16) or _END
    except BlockingIOError:
        return b""
    except ConnectionResetError:
        return _END


Act = Callable[[Sockets], bool]
"""What clients do; returns whether the answers hold random numbers."""


async def _serve(served: Sockets, steps: list[Act], *, restless: bool) -> list[object]:
    """What is seen of each step, of a server that lives through all of them, or half of one."""
    seen: list[object] = []

    async def look(hidden: bool) -> None:
        got = await served.received()
        seen.append(([one[:4] for one in got] if hidden else got, *served.host.seen()))

    if restless:
        for number, act in enumerate(steps):
            async with served.served():
                hidden = act(served)
                for _ in range(number % 5):  # as far as the server gets in that time
                    await trio.lowlevel.checkpoint()
            async with served.served():
                await look(hidden)
    else:
        async with served.served():
            for act in steps:
                await look(act(served))
    return seen


def both_servers(way: str, folder: Path, steps: list[Act]) -> None:
    """The same is seen of a server that is suspended twice a step as of one that is not."""
    blobs = prepared()
    seen = []
    for restless in (False, True):
        (folder / str(restless)).mkdir()
        served = Sockets(way, folder / str(restless), blobs)
        seen.append(
            trio.run(
                functools.partial(_serve, restless=restless), served, steps, clock=served.clock
            )
        )
        served.close()
    plain, found = seen
    assert len(plain) == len(steps)
    for number, (expected, other) in enumerate(zip(plain, found, strict=True)):
        assert other == expected, number


def _data(data: bytes, *, hidden: bool = False) -> Act:
    def act(served: Sockets) -> bool:
        if served.data is not None:
            served.data.send(data)
        return hidden

    return act


def _control(data: bytes, *, last: bool = False, hidden: bool = False, least: int = 0) -> Act:
    """On the first control connection, or the *last*; if there are more than the *least*."""

    def act(served: Sockets) -> bool:
        if len(served.controls) > least:
            served.controls[-1 if last else 0].send(data)
        return hidden

    return act


def _waits(served: Sockets) -> bool:
    """Longer than for the rest of a command, or of a request."""
    served.clock.jump(2)
    return False


def _comes(served: Sockets) -> bool:
    served.connect_control()
    return False


def _goes(served: Sockets) -> bool:
    if len(served.controls) > 1:
        served.controls.pop().close()
    return False


def _data_comes(served: Sockets) -> bool:
    served.connect_data()
    return False


def _prefixed(command: bytes, locality: int) -> bytes:
    return s.u32(8) + bytes([locality]) + s.u32(len(command)) + command


def _pieces(data: bytes, chance: random.Random) -> list[bytes]:
    cut = chance.randrange(1, len(data)) if len(data) > 1 else 1
    return [data[:cut], data[cut:]] if data[cut:] else [data]


def sockets_step(chance: random.Random) -> list[Act]:
    """One thing that clients may do, in one step or several."""
    kind = chance.choice(
        ("command",) * 5
        + ("pieces", "many", "prefixed", "control", "control", "split", "power")
        + ("hash", "blobs", "half", "waits", "comes", "goes", "data comes")
    )
    command, number = command_of(chance), chance.randrange(0, 22)
    while kind != "command" and command[6:10] == tpm.get_random(1)[6:10]:
        command = command_of(chance)
    argument = s.u32(chance.choice((0, 1, 3, 5, 3500)))
    match kind:
        case "command":
            return [_data(command, hidden=command[6:10] == tpm.get_random(1)[6:10]), _waits]
        case "pieces":
            return [*(_data(piece) for piece in _pieces(command, chance)), _waits]
        case "many":
            return [_data(tpm.pcr_read(10) * chance.randrange(2, 100))]
        case "prefixed":
            return [_data(_prefixed(command, chance.randrange(6)))]
        case "control" if number not in {s.SHUTDOWN, s.GET_STATEBLOB, s.SET_DATAFD}:
            return [_control(s.u32(number) + argument, last=True), _waits]
        case "split":
            request = s.u32(s.SET_LOCALITY) + argument
            return [_control(piece) for piece in _pieces(request, chance)]
        case "power":
            start = chance.choice((tpm.TPM2_STARTUP_STATE, tpm.TPM2_STARTUP_CLEAR))
            return [_control(s.u32(s.STOP)), _control(s.u32(s.INIT, 0)), _data(start)]
        case "hash":
            steps = [s.u32(s.HASH_START), s.u32(s.HASH_DATA, 3) + b"abc", s.u32(s.HASH_END)]
            return [_control(step) for step in steps[: chance.randrange(1, 4)]]
        case "blobs":  # the last hands the state out
            return [_control(s.u32(s.GET_STATEBLOB, 0, 1 + number % 3, 0), hidden=True)]
        case "half":
            half = s.u32(s.SET_STATEBLOB, 0, 2, 30) + bytes(9)
            return [_control(half, last=True, least=1), _waits]
        case "waits":
            return [_waits]
        case "comes":
            return [_comes]
        case "goes":
            return [_goes]
        case "data comes":
            return [_data_comes]
    return []


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("way", ["streams", "listeners", "passed"])
@in_child
def test_a_socket_server_suspended_at_every_step(way: str, seed: int, tmp_path: Path) -> None:
    steps: list[Act] = [_data_comes, _control(s.u32(s.INIT, 0)), _data(tpm.TPM2_STARTUP_CLEAR)]
    for chance in chances(seed, STEPS):
        steps += sockets_step(chance)
    both_servers(way, tmp_path, steps)


@pytest.mark.parametrize("kind", ["socket", "device", "proxy"])
def test_every_value_of_a_data_connection_outlives_a_suspension(kind: str) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        begun = b"" if kind == "proxy" else b"\x80\x01"
        saved = SavedData(theirs.detach(), kind, True, begun, Request(b"command", 3), b"unsent")
        resumed = DataConnection.resumed(saved, Vtpm(FakeEngine(), None))
        assert resumed.suspend() == saved
        os.close(saved.fd)


def test_every_value_of_a_control_connection_outlives_a_suspension() -> None:
    ours, theirs = socket.socketpair()
    with ours:
        saved = SavedControl(
            fd=theirs.detach(),
            place=SavedPlace(3.0, True, 5),
            begun=SavedControlStream(b"\0\0", True, True),
            waited=0.25,
            request=ControlRequest(PtmCommand.PTM_STOP, 14, b""),
            unsent=b"unsent",
            passed=(77,),
        )
        resumed = ControlConnection.resumed(saved, 100.0)
        assert (resumed.place.heard, resumed.begun, resumed.fds) == (97.0, 99.75, [77])
        assert resumed.suspend(101.0) == saved._replace(place=SavedPlace(4.0, True, 5), waited=1.25)
        assert resumed.fds == []  # nobody closes what is not his any more
        os.close(saved.fd)


def test_a_suspension_waits_for_the_command_that_runs() -> None:
    """And who waits for the TPM meanwhile has his answer from the next."""
    engine = FakeEngine()
    vtpm = Vtpm(engine, SealedStore(FailingStore()))
    vtpm.start()
    client, theirs = _pair()
    monitor, control = _pair()

    async def main() -> None:
        worker, saved = Worker(), []
        async with trio.open_nursery() as around, trio.open_nursery() as nursery:
            endpoints = Endpoints(data_stream=theirs, control_stream=control)
            server = SocketServer(nursery, endpoints, PtmService(vtpm), worker)
            server.start()
            engine.hold()
            client.send(LONG)
            await trio.to_thread.run_sync(engine.entered.wait, PATIENCE_SECONDS)

            async def suspend() -> None:
                saved.append(await server.suspend())

            around.start_soon(suspend)
            await trio.testing.wait_all_tasks_blocked()
            monitor.send(s.u32(s.GET_TPMESTABLISHED))
            await trio.testing.wait_all_tasks_blocked()
            assert saved == []
            engine.release()
        assert client.recv(4096) == echo(LONG)
        assert _available(monitor) == b""
        async with trio.open_nursery() as nursery:
            server = SocketServer(nursery, Endpoints(), PtmService(vtpm), worker)
            server.resume(saved[0])
            await trio.testing.wait_all_tasks_blocked()
            assert _available(monitor) == s.u32(0) + bytes(4)
            for fd in _descriptors(await server.suspend()):
                os.close(fd)
        worker.close()

    with client, monitor:
        trio.run(main)


def test_who_is_accepted_when_the_server_is_suspended_is_not_forgotten(tmp_path: Path) -> None:
    vtpm = Vtpm(FakeEngine(), SealedStore(FailingStore()))
    vtpm.start()

    async def main() -> None:
        worker = cast("Worker", InlineWorker())
        endpoints = Endpoints(
            data_listener=_listener(tmp_path / "data"), control_listener=_listener(tmp_path / "c")
        )
        saved = None
        for ticks in range(8):
            async with trio.open_nursery() as nursery:
                server = SocketServer(nursery, endpoints, PtmService(vtpm), worker)
                if saved is None:
                    server.start()
                else:
                    server.resume(saved)
                    await trio.testing.wait_all_tasks_blocked()
                monitor, client = _connected(tmp_path / "c"), _connected(tmp_path / "data")
                for _ in range(ticks):
                    await trio.lowlevel.checkpoint()
                saved, endpoints = await server.suspend(), Endpoints()
            async with trio.open_nursery() as nursery:
                server = SocketServer(nursery, endpoints, PtmService(vtpm), worker)
                server.resume(saved)
                monitor.send(s.u32(s.GET_CONFIG))
                client.send(tpm.get_random(4))
                await trio.testing.wait_all_tasks_blocked()
                assert _available(monitor) == bytes(8), ticks
                assert _available(client) == echo(tpm.get_random(4)), ticks
                monitor.close()
                client.close()
                await trio.testing.wait_all_tasks_blocked()
                saved, endpoints = await server.suspend(), Endpoints()
        assert saved is not None
        for fd in _descriptors(saved):
            os.close(fd)

    trio.run(main)


def test_a_resumed_server_takes_no_second_data_connection() -> None:
    """Its own is in use, whoever passes another."""
    vtpm = Vtpm(FakeEngine(), SealedStore(FailingStore()))
    client, theirs = _pair()
    monitor, control = _pair()

    async def main() -> None:
        worker = cast("Worker", InlineWorker())
        async with trio.open_nursery() as nursery:
            endpoints = Endpoints(data_stream=theirs, control_stream=control)
            server = SocketServer(nursery, endpoints, PtmService(vtpm), worker)
            server.start()
            saved = await server.suspend()
        async with trio.open_nursery() as nursery:
            server = SocketServer(nursery, Endpoints(), PtmService(vtpm), worker)
            server.resume(saved)
            socket.send_fds(monitor, [s.u32(s.SET_DATAFD)], [client.fileno()])
            await trio.testing.wait_all_tasks_blocked()
            assert _available(monitor) == s.u32(0x1F)
            for fd in _descriptors(await server.suspend()):
                os.close(fd)

    with client, monitor:
        trio.run(main)


def test_who_was_about_to_be_turned_away_is_so_after_a_resumption() -> None:
    vtpm = Vtpm(FakeEngine(), SealedStore(FailingStore()))
    pairs = [_pair() for _ in range(PLACES + 1)]
    empty = SavedControlStream(b"", False, False)
    saved = SavedSockets(
        *(None, None, None, None, ()),
        controls=tuple(
            SavedControl(theirs.detach(), SavedPlace(9.0, False, 0), empty, None, None, b"", ())
            for _, theirs in pairs
        ),
    )

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            worker = cast("Worker", InlineWorker())
            server = SocketServer(nursery, Endpoints(), PtmService(vtpm), worker)
            server.resume(saved)
            await trio.testing.wait_all_tasks_blocked()
            ended = [number for number, (ours, _) in enumerate(pairs) if _available(ours) == _END]
            assert ended == [0]
            for fd in _descriptors(await server.suspend()):
                os.close(fd)

    trio.run(main)
    for ours, _ in pairs:
        ours.close()
