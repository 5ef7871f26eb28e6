"""What a manager makes of a worker that was taken over: it reaches its own TPM, and nobody else's."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import select
import signal
import socket
import threading
from typing import TYPE_CHECKING, Any

import pytest
import trio

from tests.support.files import open_descriptors
from tests.support.fleet import Puppet, in_trio
from tests.support.liars import BLOB, asked, catalogue_of_two, everything, stage_of
from tests.support.waiting import PATIENCE_SECONDS
from vtpm_cuse.errors import FleetError, UsageError
from vtpm_cuse.fleet.blocking import close_all
from vtpm_cuse.fleet.channel import Channel
from vtpm_cuse.fleet.manager import threads, workers
from vtpm_cuse.fleet.manager.making import make
from vtpm_cuse.fleet.manager.workers import Workers
from vtpm_cuse.fleet.messages import Answer, Call, Kind, Message, MessageHeader, Order, Report
from vtpm_cuse.fleet.states.vault import Vault
from vtpm_cuse.fleet.tasks import OFF, ON, RESUME, WATCH_DATA, Task
from vtpm_cuse.wire.layout import HOST

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from vtpm_cuse.fleet.states.catalogue import Catalogue


@pytest.fixture
def catalogue(tmp_path: Path) -> Iterator[Catalogue]:
    """With two TPMs, one and two."""
    with catalogue_of_two(tmp_path / "state") as found:
        yield found


@in_trio
async def test_what_was_saved_is_given_out_once(catalogue: Catalogue, tmp_path: Path) -> None:
    async with stage_of(catalogue, tmp_path) as stage:
        puppet = await stage.started(stage.one.start)
        assert (puppet.told.flags, len(puppet.told.descriptors)) == (ON, 3)
        await puppet.orders.send(Message(Report.ASLEEP, b"volatile", WATCH_DATA, 5))
        await puppet.worker.ended.wait()
        assert stage.one.state == "asleep"
        puppet = await stage.started(stage.one.wake)
        assert puppet.told.flags == RESUME
        assert Task.unpack(puppet.told.body)[2:4] == (b"volatile", BLOB)
        puppet.process.kill()
        puppet.orders.close()
        await puppet.worker.ended.wait()
        assert stage.one.state == "failed"
        puppet = await stage.started(stage.one.wake_for_client)
        assert puppet.told.flags == OFF
        assert Task.unpack(puppet.told.body)[2:4] == (b"", b"")


@in_trio
async def test_what_is_no_connection_is_not_kept(catalogue: Catalogue, tmp_path: Path) -> None:
    async with stage_of(catalogue, tmp_path) as stage:
        puppet = await stage.started(stage.one.start)
        nothing = os.open("/dev/null", os.O_RDONLY)
        await puppet.orders.send(Message(Report.ASLEEP, descriptors=(nothing,)))
        os.close(nothing)
        await puppet.worker.ended.wait()
        assert (stage.one.state, stage.one.described().pid) == ("failed", None)
        assert puppet.process.wait(PATIENCE_SECONDS) == -9


@in_trio
async def test_what_a_worker_says_of_its_tpm_is_bounded(
    catalogue: Catalogue, tmp_path: Path
) -> None:
    async with stage_of(catalogue, tmp_path) as stage:
        puppet = await stage.started(stage.one.start)

        async def say(message: Message) -> None:
            assert await puppet.orders.receive() == Message(Order.LOOK, b"caps")
            await puppet.orders.send(message)

        for message, seen in (
            *((Message(Report.TOLD, b"x"), b"x"), (Message(Report.TOLD, b"x", errno.ENOENT), None)),
            *(
                (Message(Report.TOLD, bytes(1 << 14)), "cannot tell"),
                (Message(Report.DONE), "in the middle"),
            ),
            *(
                (Message(Report.TOLD, b"x", errno.EBUSY), "cannot tell"),
                (Message(Report.BUSY), "in the middle"),
            ),
        ):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(say, message)
                if isinstance(seen, str):
                    with pytest.raises(FleetError, match=seen) as info:
                        await stage.one.look("caps")
                    assert info.value.fault == "Busy"
                else:
                    assert await stage.one.look("caps") == seen


@pytest.mark.parametrize("seed", range(4))
@in_trio
async def test_a_worker_that_lies_is_ended_and_reaches_nobody(
    catalogue: Catalogue, tmp_path: Path, caplog: pytest.LogCaptureFixture, seed: int
) -> None:
    chance = random.Random(seed)  # noqa: S311
    other = everything(os.path.join(catalogue.path, "two"))
    before = _sockets()
    async with stage_of(catalogue, tmp_path) as stage:
        for _ in range(12):
            begin = stage.one.start if stage.one.state == "stopped" else stage.one._awake
            puppet = await stage.started(begin)
            for _ in range(chance.randrange(1, 6)):
                if puppet.worker.ended.is_set():
                    break
                _lie(puppet, chance)
                for _ in range(20):
                    await trio.lowlevel.checkpoint()
            puppet.process.kill()  # if it has not been found out
            await puppet.worker.ended.wait()
            assert puppet.process.wait(PATIENCE_SECONDS) == -9
            assert stage.one.state in {"failed", "asleep", "stopped"}
            said = [record.getMessage() for record in caplog.records]
            assert len(said) < 2, said
            caplog.clear()
    assert everything(os.path.join(catalogue.path, "two")) == other
    assert _sockets() <= before
    vault = Vault(catalogue.state_of("one"))
    assert asked(vault, Call.LOAD).body[:30] == BLOB[:30]
    vault.close()


class _Maker(Workers):
    """Gives one worker, which a test plays."""

    def __init__(self, puppet: Puppet) -> None:
        self._puppet = puppet

    async def take(self) -> workers.WorkerProcess:
        await trio.lowlevel.checkpoint()
        return self._puppet.worker

    def refill(self) -> None:
        pass


@in_trio
async def test_what_the_maker_of_a_tpm_hands_over_is_closed_aside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    aside: list[int] = []
    close = threads.close_aside

    async def noted(descriptors: tuple[int, ...]) -> threading.Thread | None:
        aside.append(len(descriptors))
        return await close(descriptors)

    monkeypatch.setattr(workers, "close_aside", noted)
    before, puppet, ends = open_descriptors(), Puppet(), os.pipe()

    async def lie() -> None:
        assert (await puppet.orders.receive()) is not None
        await puppet.calls.send(Message(Call.ROOM, number=1, descriptors=ends))
        assert (await puppet.calls.receive()) is not None
        await puppet.orders.send(Message(Report.STOPPED, descriptors=ends))
        close_all(ends)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(lie)
        with pytest.raises(UsageError, match="not been stored"):
            await make(_Maker(puppet), "one", None)
    puppet.end()
    assert sum(aside) == 4
    assert open_descriptors() <= before


@in_trio
async def test_the_end_of_a_maker_is_that_of_its_process() -> None:
    """Its ends of the channels are held here, too."""
    puppet = Puppet()

    async def die() -> None:
        assert (await puppet.orders.receive()) is not None
        puppet.process.kill()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(die)
        with pytest.raises(UsageError, match="has ended"):
            await make(_Maker(puppet), "one", None)
    puppet.end()


def _sockets() -> set[str]:
    """Those that are open here; some that earlier tests have left may go meanwhile."""
    return {one for one in open_descriptors() if ":socket:" in one}


def _lie(puppet: Puppet, chance: random.Random) -> None:
    kinds: tuple[Kind, ...] = (*Report, *Call, *Order, *Answer)
    body = chance.choice(
        (b"", BLOB, os.urandom(chance.randrange(99)), b"{}\n", b"\x1b[31m\n" * 999)
    )
    number = chance.choice((0, 1, 2, 5, 1 << 63, (1 << 64) - 1))
    message = Message(chance.choice(kinds), body, chance.randrange(256), number)
    end = chance.choice((puppet._calls, puppet._orders))
    end.setblocking(False)
    with contextlib.suppress(OSError):  # it has been found out
        match chance.randrange(8):
            case 0:
                text = message.pack()
                end.send(text[: chance.randrange(len(text))] + os.urandom(9))
            case 1:
                for _ in range(500):
                    end.send(message._replace(body=b"").pack())
            case 2:
                end.shutdown(chance.choice((socket.SHUT_RD, socket.SHUT_WR)))
            case 3:
                puppet._line.send(b"")
            case 4 | 5:
                _hand_over(end, puppet, message, chance)
            case _:
                end.send(message.pack())


def _hand_over(end: socket.socket, puppet: Puppet, message: Message, chance: random.Random) -> None:
    """Descriptors, of which it says that there are so many."""
    with contextlib.ExitStack() as stack:
        unix = [stack.enter_context(socket.socket(socket.AF_UNIX, kind)) for kind in _UNIX]
        network = stack.enter_context(socket.socket())
        network.bind(("127.0.0.1", 0))
        network.listen()
        pair = [stack.enter_context(one) for one in socket.socketpair()]
        file = stack.enter_context(open("/proc/self/stat", "rb"))
        poll = stack.enter_context(select.epoll())
        sorts: tuple[list[Any], ...] = (
            unix,
            [network],
            pair * 60,
            [file] * 250,
            [poll, puppet._orders, puppet._line],
        )
        given = [one.fileno() for one in chance.choice(sorts)]
        said = chance.choice((0, 1, len(given), len(given), 500))
        kind = chance.choice((Report.ASLEEP, message.kind))
        header = MessageHeader(kind, message.flags, said, len(message.body), 0).pack(HOST)
        socket.send_fds(end, [chance.choice((header, header[:1])) + message.body], given)


_UNIX = (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET)


@in_trio
async def test_the_end_of_a_process_is_not_what_somebody_else_holds(
    catalogue: Catalogue, tmp_path: Path
) -> None:
    async with stage_of(catalogue, tmp_path) as stage:
        puppet = await stage.started(stage.one.start)
        # Both ends of its own are on their way to its manager, and here, too.
        ends = [puppet._orders.fileno(), puppet._calls.fileno()]
        socket.send_fds(puppet._orders, [b"?"], ends)
        puppet.process.kill()
        await puppet.worker.ended.wait()
        assert stage.one.state == "failed"
        with pytest.raises(BrokenPipeError):
            puppet._orders.send(Message(Report.SERVING).pack())


@in_trio
async def test_who_is_ended_says_nothing_more_and_is_not_waited_for(
    catalogue: Catalogue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_DIE_SECONDS", 0.0)
    async with stage_of(catalogue, tmp_path) as stage:
        puppet = await stage.started(stage.one.start)
        with monkeypatch.context() as patch:  # the kernel cannot end it yet
            patch.setattr(signal, "pidfd_send_signal", lambda *_: None)
            puppet.worker.kill("so be it")
            await puppet.worker.ended.wait()
        assert puppet.process.poll() is None
        assert stage.one.described().failure == "so be it"


@in_trio
async def test_what_its_owner_does_not_let_go_holds_up_nobody_else(
    catalogue: Catalogue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a file in a mount that nobody serves, which is closed once that is served."""
    monkeypatch.setattr(threads, "_CLOSE_SECONDS", 0.0)
    close, let_go, held = os.close, threading.Event(), os.memfd_create("held")
    number = os.fstat(held).st_ino

    def close_it(fd: int) -> None:
        if os.fstat(fd).st_ino == number:
            assert let_go.wait(PATIENCE_SECONDS), "everybody waits"
        close(fd)

    async with stage_of(catalogue, tmp_path) as stage:
        for kind in (Report.ASLEEP, Report.DONE, Call.SIZES):
            let_go.clear()
            begin = stage.one.start if stage.one.state == "stopped" else stage.one._awake
            puppet = await stage.started(begin)
            monkeypatch.setattr(os, "close", close_it)
            end = puppet._calls if kind is Call.SIZES else puppet._orders
            socket.send_fds(end, [Message(kind, descriptors=(held,)).pack()], [held])
            await puppet.worker.ended.wait()
            assert stage.one.state == "failed"
            with pytest.raises(FleetError, match="does not let it go") as refused:
                await stage.one._awake()
            assert refused.value.fault == "Busy"
            closer = stage.one._closer
            assert closer is not None
            let_go.set()
            closer.join(PATIENCE_SECONDS)
            assert not closer.is_alive()
            monkeypatch.setattr(os, "close", close)
    close(held)


@pytest.mark.parametrize("way", ["file", "nothing", "two", "silent", "another kind", "end"])
@in_trio
async def test_a_zygote_that_answers_with_no_process_is_none(
    monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr(workers, "_FORK_SECONDS", 0.0 if way == "silent" else PATIENCE_SECONDS)
    before = _sockets()
    ours, theirs = map(Channel, socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))

    async def answer() -> None:
        asked_for = await theirs.receive()
        assert asked_for is not None
        file, process = os.open("/dev/null", os.O_RDONLY), os.pidfd_open(os.getpid())
        given = {"file": [file], "two": [process] * 2, "another kind": [process]}
        kind = Report.FAILED if way == "another kind" else Report.DONE
        if way == "end":
            theirs.close()
        elif way != "silent":
            await theirs.send(Message(kind, descriptors=tuple(given.get(way, ()))))
        close_all((file, process, *asked_for.descriptors))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer)
        assert await workers._fork(ours) is None
    ours.close()
    theirs.close()
    assert _sockets() <= before
