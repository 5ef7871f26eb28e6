"""The trio loop on a channel whose other end is here, with a real worker thread."""

from __future__ import annotations

import errno
import logging
import select
import socket
import struct
import threading
from typing import TYPE_CHECKING

import pytest
import trio
import trio.lowlevel

from tests.support import commands as tpm
from tests.support import kernel as fake
from tests.support import ptm
from tests.support.channel import Client
from tests.support.engine import CANCELED, FakeEngine, echo
from tests.support.kernel import FakeKernel
from tests.support.stores import FailingStore
from tests.support.waiting import PATIENCE_SECONDS
from vtpm_cuse.acquire import cuse
from vtpm_cuse.acquire.cuse import CuseChannel, open_cuse
from vtpm_cuse.errors import FrontendError, StateLocked
from vtpm_cuse.proto.device import DeviceSession
from vtpm_cuse.serve import device
from vtpm_cuse.serve.device import DeviceServer
from vtpm_cuse.serve.worker import Worker
from vtpm_cuse.storage.sealed import SealedStore
from vtpm_cuse.vtpm.ptm import PtmService
from vtpm_cuse.vtpm.vtpm import Vtpm

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

LONG = tpm.create_primary_rsa()
RANDOM = tpm.get_random(8)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, CuseChannel]]:
    """Whole messages both ways, as on /dev/cuse."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.setblocking(False)
    with ours:
        yield ours, CuseChannel(theirs.detach())


class Served:
    """What a scenario gets."""

    def __init__(self, pair: tuple[socket.socket, CuseChannel]) -> None:
        end, self.channel = pair
        self.store = FailingStore()
        self.engine = FakeEngine()
        self.vtpm = Vtpm(self.engine, SealedStore(self.store))
        self.vtpm.start()
        self.give_up: Callable[[], None] = lambda: None
        self.ptm = PtmService(self.vtpm, lambda: self.give_up())
        self.client = Client(end)
        self.scope = trio.CancelScope()
        self.ended = trio.Event()


def serve(
    pair: tuple[socket.socket, CuseChannel],
    scenario: Callable[[Served], Awaitable[None]],
) -> Served:
    """Runs the server and the scenario; the server is cancelled when that is over."""
    result: list[Served] = []

    async def main() -> None:
        served = Served(pair)
        result.append(served)
        worker = Worker()
        server = DeviceServer(
            served.vtpm,
            served.ptm,
            worker,
            lambda file, _: [device.Served(served.channel, DeviceSession(file))],
        )

        async def run_server() -> None:
            with served.scope:
                await server.serve()
            served.ended.set()

        try:
            with trio.fail_after(PATIENCE_SECONDS):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(run_server)
                    await scenario(served)
                    served.scope.cancel()
        finally:
            await server.settle()
            worker.close()
            served.channel.close()

    trio.run(main)
    return result[0]


# -- serving ------------------------------------------------------------------------------


def test_commands(pair: tuple[socket.socket, CuseChannel]) -> None:
    async def scenario(served: Served) -> None:
        client = served.client
        await client.open()
        for count in range(100):
            command = tpm.get_random(count)
            assert await client.write(command) == 0
            assert await client.read(10) == echo(command)[:10]
            assert await client.read() == echo(command)[10:]
            assert await client.read() == b""

    serve(pair, scenario)


def test_other_tasks_get_their_turn(pair: tuple[socket.socket, CuseChannel]) -> None:
    """Even when there is always a next request to read."""

    async def scenario(served: Served) -> None:
        turns = 0
        over = False

        async def other() -> None:
            nonlocal turns
            while not over:
                turns += 1
                await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(other)
            await served.client.open()
            for _ in range(20):
                for _ in range(40):
                    await served.client.send(fake.POLL, bytes(24))
                for _ in range(40):
                    await served.client.receive()
            over = True
        assert turns > 20

    serve(pair, scenario)


def test_long_command_leaves_the_device_responsive(
    pair: tuple[socket.socket, CuseChannel],
) -> None:
    async def scenario(served: Served) -> None:
        client = served.client
        await client.open()
        served.engine.hold()
        assert await client.write(LONG) == 0
        reading = await client.start_read()
        assert await client.ioctl(ptm.GET_CONFIG) == 0
        assert await client.write(RANDOM) == errno.EBUSY
        served.engine.release()
        assert await client.receive() == (reading, 0, echo(LONG))

    serve(pair, scenario)


def test_cancel_reaches_a_running_command(pair: tuple[socket.socket, CuseChannel]) -> None:
    async def scenario(served: Served) -> None:
        client = served.client
        await client.open()
        served.engine.hold()
        await client.write(LONG)
        assert await client.ioctl(ptm.CANCEL_TPM_CMD) == 0
        reading = await client.start_read()
        assert await client.receive() == (reading, 0, CANCELED)
        assert await client.write(RANDOM) == 0
        assert await client.read() == echo(RANDOM)

    serve(pair, scenario)


def test_cancellation_is_repeated(pair: tuple[socket.socket, CuseChannel]) -> None:
    """The library forgets one that comes before it has begun with the command."""

    async def scenario(served: Served) -> None:
        client = served.client
        engine = served.engine
        really = engine.cancel
        asked = 0

        def forgetful() -> int:
            nonlocal asked
            asked += 1
            return really() if asked >= 5 else 0

        engine.cancel = forgetful  # type: ignore[method-assign]
        await client.open()
        engine.hold()
        await client.write(LONG)
        await client.ioctl(ptm.CANCEL_TPM_CMD)
        reading = await client.start_read()
        assert await client.receive() == (reading, 0, CANCELED)

    serve(pair, scenario)


def test_interrupt_frees_a_waiting_client(pair: tuple[socket.socket, CuseChannel]) -> None:
    async def scenario(served: Served) -> None:
        client = served.client
        await client.open()
        served.engine.hold()
        await client.write(LONG)
        reading = await client.start_read()
        await client.interrupt(reading)
        assert await client.receive() == (reading, errno.EINTR, b"")
        served.engine.release()
        reading = await client.start_read()
        assert await client.receive() == (reading, 0, echo(LONG))

    serve(pair, scenario)


def test_poll_notification(pair: tuple[socket.socket, CuseChannel]) -> None:
    async def scenario(served: Served) -> None:
        client = served.client
        await client.open()
        served.engine.hold()
        await client.write(LONG)
        error, body = await client.call(fake.POLL, struct.pack("=QQII", client.handle, 77, 1, 1))
        assert (error, struct.unpack("=II", body)[0]) == (0, 0)
        served.engine.release()
        assert await client.receive() == (0, -1, struct.pack("=Q", 77))

    serve(pair, scenario)


def test_a_bug_costs_one_request(
    pair: tuple[socket.socket, CuseChannel],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(logging.getLogger("vtpm_cuse"), "propagate", True)

    async def scenario(served: Served) -> None:
        client = served.client
        await client.open()
        served.engine.faults["established"] = KeyError("a bug")
        unique = await client.start_ioctl(ptm.GET_TPMESTABLISHED)
        assert await client.receive() == (unique, errno.EIO, b"")
        served.engine.script[0x17B] = KeyError("a bug")
        assert await client.write(RANDOM) == 0
        assert (await client.read()).hex() == "80010000000a00000101"
        assert await client.ioctl(ptm.GET_CONFIG) == 0

    serve(pair, scenario)
    assert "a bug" in caplog.text


def test_a_bug_in_a_long_command(pair: tuple[socket.socket, CuseChannel]) -> None:
    async def scenario(served: Served) -> None:
        client = served.client
        await client.open()
        served.engine.script[0x131] = KeyError("a bug")
        await client.write(LONG)
        reading = await client.start_read()
        unique, error, body = await client.receive()
        assert (unique, error, body.hex()) == (reading, 0, "80010000000a00000101")
        await client.write(RANDOM)
        assert await client.read() == echo(RANDOM)

    serve(pair, scenario)


# -- the end ------------------------------------------------------------------------------


def test_shutdown_ends_it_at_release(pair: tuple[socket.socket, CuseChannel]) -> None:
    async def scenario(served: Served) -> None:
        client = served.client
        await client.open()
        assert await client.ioctl(ptm.SHUTDOWN) == 0
        assert await client.ioctl(ptm.GET_CONFIG) == 0
        assert not served.ended.is_set()
        await client.release()
        await served.ended.wait()
        assert not served.engine.running

    serve(pair, scenario)


def test_what_a_successor_needs_is_given_up_before_shutdown_is_answered(
    pair: tuple[socket.socket, CuseChannel],
) -> None:
    """And nothing that the client says then takes it back."""
    end, _ = pair

    async def scenario(served: Served) -> None:
        client = served.client
        answered_before: list[bool] = []

        def give_up() -> None:
            answered_before.append(bool(select.select([end], [], [], 0)[0]))
            served.store.unlock()

        served.give_up = give_up
        served.store.lock()
        await client.open()
        assert await client.ioctl(ptm.SHUTDOWN) == 0
        assert answered_before == [False]
        for request in (ptm.INIT, ptm.STORE_VOLATILE, ptm.SET_STATEBLOB, ptm.LOCK_STORAGE):
            assert await client.ioctl(request) == 0xA
            assert not served.engine.running
            assert not served.store.locked
        assert answered_before == [False]

    serve(pair, scenario)


@pytest.mark.parametrize("busy", [False, True])
def test_shutdown_does_not_wait_for_ever_for_the_release(
    pair: tuple[socket.socket, CuseChannel], monkeypatch: pytest.MonkeyPatch, busy: bool
) -> None:
    """Nor where it had to wait for a long command first."""

    async def scenario(served: Served) -> None:
        client = served.client
        await client.open()
        if busy:
            served.engine.hold()
            await client.write(LONG)
        shutdown = await client.start_ioctl(ptm.SHUTDOWN)
        served.engine.release()
        assert (await client.receive())[:2] == (shutdown, 0)
        with trio.move_on_after(PATIENCE_SECONDS / 6):
            await served.ended.wait()
        assert served.ended.is_set()

    monkeypatch.setattr(device, "_RELEASE_GRACE_SECONDS", 0.01)
    serve(pair, scenario)


def test_running_command_is_ended_and_awaited(pair: tuple[socket.socket, CuseChannel]) -> None:
    async def scenario(served: Served) -> None:
        await served.client.open()
        served.engine.hold()
        await served.client.write(LONG)
        await trio.to_thread.run_sync(served.engine.entered.wait, PATIENCE_SECONDS)

    served = serve(pair, scenario)
    assert served.engine.commands == [LONG]
    assert served.engine.calls.count("cancel") >= 1


def test_endless_lock_attempts_do_not_keep_it_alive(
    pair: tuple[socket.socket, CuseChannel],
) -> None:
    """A client that asks for 2^32 tries, 497 days, must not make the process immortal."""
    still_trying_after_the_end = False

    async def scenario(served: Served) -> None:
        nonlocal still_trying_after_the_end
        client = served.client
        await client.open()
        await client.ioctl(ptm.STOP)
        served.store.faults["lock"] = StateLocked("x", "taken")
        await client.start_ioctl(ptm.LOCK_STORAGE, ptm.u32(0xFFFFFFFF))
        really = served.store.lock
        over = threading.Event()
        after_end = 0

        def lock() -> None:
            nonlocal after_end, still_trying_after_the_end
            after_end += over.is_set()
            if after_end > 20:
                still_trying_after_the_end = True
                served.store.faults.clear()
            really()

        served.store.lock = lock  # type: ignore[method-assign]
        while served.store.locks < 5:
            await trio.lowlevel.checkpoint()
        over.set()

    serve(pair, scenario)
    assert not still_trying_after_the_end


# -- the channel --------------------------------------------------------------------------


def test_create_device(pair: tuple[socket.socket, CuseChannel]) -> None:
    end, channel = pair
    end.send(FakeKernel.message(4096, 2, struct.pack("=IIII", 7, 38, 0, 1)))
    channel.create_device("vtpm7", 0, 0)
    assert end.recv(8192).endswith(b"DEVNAME=vtpm7\0")
    channel.close()


def test_refused_device(pair: tuple[socket.socket, CuseChannel]) -> None:
    end, channel = pair
    end.send(FakeKernel.message(4096, 2, struct.pack("=IIII", 7, 38, 0, 1)))
    end.shutdown(socket.SHUT_RDWR)  # the channel is dead, as after a name that is taken
    with pytest.raises((FrontendError, BrokenPipeError)):
        channel.create_device("vtpm7", 0, 0)
    channel.close()


@pytest.mark.parametrize(
    ("path", "words"),
    [("/dev/no-such-cuse", "modprobe cuse"), ("/dev/null/x", "cannot open")],
)
def test_no_channel(monkeypatch: pytest.MonkeyPatch, path: str, words: str) -> None:
    monkeypatch.setattr(cuse, "CUSE_PATH", path)
    with pytest.raises(FrontendError) as caught:
        open_cuse()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_ends_without_an_answer_when_another_process_has_the_state(
    pair: tuple[socket.socket, CuseChannel],
) -> None:
    """As for sockets: no client may take the refusal for the word of its TPM."""

    async def scenario(served: Served) -> None:
        client = served.client
        await client.open()
        served.vtpm.release_storage()
        served.store.faults["lock"] = StateLocked("x", "taken")
        assert await client.write(RANDOM) == 0
        await client.start_read()
        await served.ended.wait()
        with pytest.raises(BlockingIOError):
            pair[0].recv(1)

    served = serve(pair, scenario)
    assert served.vtpm.state_lost
    assert served.engine.calls == ["start"]
