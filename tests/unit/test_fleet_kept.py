"""What outlives a killed manager, in parts: lines, who hears on one, the depot, what is slept with."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from typing import TYPE_CHECKING, Any, Final, cast

import pytest
import trio
import trio.testing

from tests.support.fleet import fleet, in_trio
from tests.support.fleet_devices import fake_opener, started_device
from tests.support.waiting import PATIENCE_SECONDS
from vtpm_cuse.errors import ChannelError
from vtpm_cuse.fleet import depot, heritage, lines
from vtpm_cuse.fleet.blocking import BlockingChannel, close_all
from vtpm_cuse.fleet.channel import Channel
from vtpm_cuse.fleet.heritage import SavedManager
from vtpm_cuse.fleet.manager import deposits
from vtpm_cuse.fleet.manager.volatile import Volatile
from vtpm_cuse.fleet.messages import Answer, Call, Message, Order, Report
from vtpm_cuse.fleet.worker.hearing import Hearing
from vtpm_cuse.programs import start_program

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator
    from pathlib import Path

    from vtpm_cuse.service.process.notify import ServiceManager

SERVING = Message(Report.SERVING)
_SLOW_SECONDS: Final = 0.2


@contextlib.contextmanager
def manager(line: socket.socket) -> Iterator[tuple[Channel, Channel]]:
    """Its ends of the channels for orders and for calls."""
    orders, calls = map(Channel, lines.bring(line, 2, lines.TELL))
    with contextlib.closing(orders), contextlib.closing(calls):
        yield orders, calls


@in_trio
async def test_the_next_manager_is_told_what_lasts_and_gives_orders() -> None:
    line, end = lines.line()
    with line, contextlib.closing(Hearing(end)) as hearing, trio.fail_after(PATIENCE_SECONDS):
        async with trio.open_nursery() as nursery:
            got: list[Message | None] = []

            async def hear() -> None:
                got.append(await hearing.receive())

            with manager(line):
                nursery.start_soon(hear)
                await trio.testing.wait_all_tasks_blocked()
            with manager(line) as (orders, _):
                blank = await orders.receive()
                assert blank is not None
                assert blank.kind is Report.READY
                await orders.send(Message(Order.SERVE))
                await trio.testing.wait_all_tasks_blocked()
                await hearing.say(SERVING, lasts=True)
                await hearing.say(Message(Report.DONE))
                assert [await orders.receive(), await orders.receive()] == [
                    SERVING,
                    Message(Report.DONE),
                ]
            nursery.start_soon(hear)
            with manager(line) as (orders, _):
                assert await orders.receive() == SERVING
                await orders.send(Message(Order.STOP))
                await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(hear)
            await trio.testing.wait_all_tasks_blocked()
            line.close()
        assert [one and one.kind for one in got] == [Order.SERVE, Order.STOP, None]


@in_trio
async def test_what_was_not_answered_is_asked_of_the_next_manager() -> None:
    """While another thread waits for orders, who hears of the next manager through it."""
    line, end = lines.line()
    with line, contextlib.closing(Hearing(end)) as hearing, trio.fail_after(PATIENCE_SECONDS):
        call, done = Message(Call.STORE, b"state"), Message(Answer.DONE, b"it is")
        async with trio.open_nursery() as nursery:
            answers: list[Message | None] = []

            async def ask() -> None:
                answers.append(await trio.to_thread.run_sync(hearing.ask, call))

            with manager(line) as (orders, calls):
                nursery.start_soon(hearing.receive)
                nursery.start_soon(ask)
                assert await calls.receive() == call
            with manager(line) as (orders, calls):
                assert await calls.receive() == call
                await calls.send(done)
                ready = await orders.receive()
                assert ready is not None
                assert ready.kind is Report.READY
                await orders.send(Message(Order.STOP))
        assert answers == [done]
        line.close()
        assert await trio.to_thread.run_sync(hearing.ask, call) is None


@contextlib.contextmanager
def a_depot() -> Iterator[socket.socket]:
    """One in a thread: its line; behind it, it has ended."""
    line, end = lines.line()
    thread = threading.Thread(target=depot.keep, args=(end,))
    thread.start()
    try:
        with line:
            yield line
    finally:
        thread.join(PATIENCE_SECONDS)
        end.close()
    assert not thread.is_alive()


def told(line: socket.socket, word: bytes = lines.TELL) -> tuple[BlockingChannel, list[Message]]:
    """A manager of it, and what it hears."""
    (end,) = lines.bring(line, 1, word)
    channel = BlockingChannel(end)
    found: list[Message] = []
    while (message := channel.receive()) is not None and message.kind is not Report.READY:
        found.append(message)
    return channel, found


def test_the_depot_tells_the_next_manager_what_was_put_last() -> None:
    source, sink = os.pipe()
    with a_depot() as line:
        channel, found = told(line)
        assert found == []
        for text in (b"one\nold", b"two\n", b"one\nnew"):
            channel.send(Message(Order.KEEP, text, descriptors=(sink,)))
        channel.send(Message(Order.FORGET, b"two\n"))
        channel._socket.sendall(Message(Order.KEEP, b"one\nhalf of it").pack()[:-4])
        channel.close()
        channel, found = told(line, lines.GO_ON)
        assert found == []
        channel.close()
        channel, (one,) = told(line)
        assert (one.body, len(one.descriptors)) == (b"one\nnew", 1)
        os.close(sink)
        os.write(one.descriptors[0], b"open")
        assert os.read(source, 4) == b"open"
        close_all(one.descriptors)
        channel.close()
    assert os.read(source, 1) == b""  # nobody has the other end any more
    os.close(source)


def test_the_depot_has_what_was_put_by_one_who_has_not_waited_for_it() -> None:
    line, end = lines.line()
    with line, end:
        (one,) = lines.bring(line, 1, lines.GO_ON)
        with contextlib.closing(BlockingChannel(one)) as channel:
            channel.send(Message(Order.KEEP, b"one\n"))
        (one,) = lines.bring(line, 1, lines.TELL)
        one.shutdown(socket.SHUT_WR)  # it only hears
        line.close()
        depot.keep(end)
        with contextlib.closing(BlockingChannel(one)) as channel:
            told_first = channel.receive()
    assert told_first == Message(Order.KEEP, b"one\n")


class Store:
    """A service manager that keeps one descriptor, which it has anyway."""

    def store(self, _name: str, _fd: int) -> None:
        """Has it."""

    def forget(self, _name: str) -> None:
        """Has it not."""


def test_a_depot_that_hangs_is_ended_and_its_manager_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    begun: list[subprocess.Popen[bytes]] = []

    def begin(_: object, **more: Any) -> subprocess.Popen[bytes]:  # noqa: ANN401
        begun.append(start_program(["/bin/sleep", "1000"], **more))  # which reads nothing
        return begun[0]

    monkeypatch.setattr(deposits, "start_program", begin)
    monkeypatch.setattr(deposits, "_PATIENCE_SECONDS", 0.01)
    before = os.listdir("/proc/self/fd")
    kept = deposits.Deposits(cast("ServiceManager", Store()), None)
    for _ in range(2):  # more than fits on the way, and once more
        kept.put(SavedManager("x" * (1 << 20), 0, 0, True, None, None))
    kept.settle()
    assert os.waitstatus_to_exitcode(os.waitpid(begun[0].pid, 0)[1]) == -signal.SIGKILL
    assert len(caplog.records) == 1
    os.close(kept.leave())
    assert os.listdir("/proc/self/fd") == before


@in_trio
async def test_a_device_has_gone_when_its_tpm_is_off_whoever_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A depot that takes its time."""
    begun: list[int] = []

    def begin(*words: Any, **more: Any) -> subprocess.Popen[bytes]:  # noqa: ANN401
        process = start_program(*words, **more)
        begun.append(process.pid)
        return process

    monkeypatch.setattr(deposits, "start_program", begin)
    kept = deposits.Deposits(cast("ServiceManager", Store()), None)
    try:
        with fake_opener() as opener:
            async with fleet(tmp_path, opener, kept, spare=0) as manager:
                await started_device(manager, "one")
                os.kill(begun[0], signal.SIGSTOP)
                timer = threading.Timer(_SLOW_SECONDS, os.kill, (begun[0], signal.SIGCONT))
                timer.start()
                await manager.stop("one")
                assert opener.gone("vtpmd-one")
                timer.join()
    finally:
        os.kill(begun[0], signal.SIGCONT)
        os.close(kept.leave())
    assert (await trio.to_thread.run_sync(os.waitpid, begun[0], 0))[1] == 0


@pytest.mark.parametrize("outlives", [False, True])
def test_what_a_tpm_sleeps_with_is_handed_out_once(*, outlives: bool) -> None:
    volatile = Volatile(b"asleep", outlives=outlives)
    others = None if volatile.fd is None else os.dup(volatile.fd)
    assert (others is not None) == outlives
    assert volatile.take() == b"asleep"
    assert volatile.take() == b""
    if others is not None:
        assert Volatile.resume(b"", others) is None
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(others)


def test_what_a_killed_manager_has_not_handed_out_the_next_one_has() -> None:
    left = Volatile(b"asleep", outlives=True)
    found = Volatile.resume(*left.leave())
    assert found is not None
    assert found.take() == b"asleep"


def test_a_record_comes_with_its_descriptors() -> None:
    saved = SavedManager("form", 7, 9, True, None, None)
    text, descriptors = heritage.detached(saved)
    assert descriptors == (7, 9)
    assert heritage.attached(text, (3, 4)) == saved._replace(lock=3, listener=4)
    with pytest.raises(ChannelError, match="another version"):
        heritage.attached(text, (3,))
