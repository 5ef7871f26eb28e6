"""What a worker does before it has a TPM: all of its work, and nothing is left of it."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio

from vtpm_cuse.engine.libtpms import LibtpmsEngine
from vtpm_cuse.errors import ChannelError
from vtpm_cuse.fleet.messages import Message, Report
from vtpm_cuse.fleet.worker import rehearsal, worker
from vtpm_cuse.fleet.worker.saved import unpacked
from vtpm_cuse.serve.sockets import SocketServer

if TYPE_CHECKING:
    from collections.abc import Callable

    from vtpm_cuse.fleet.worker.hearing import Hearing
    from vtpm_cuse.fleet.worker.store import Managers


def held() -> set[object]:
    """Descriptors and threads; those that earlier tests have left may go at any time."""
    gc.collect()
    return {*os.listdir("/proc/self/fd"), *threading.enumerate()}


def test_all_is_done_and_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[object] = []
    powered: list[LibtpmsEngine] = []
    in_child: list[int] = []
    resume, start = SocketServer.resume, LibtpmsEngine.start

    def note_server(server: SocketServer, saved: object) -> None:
        served.append(saved)
        resume(server, saved)  # type: ignore[arg-type]

    def note_power(engine: LibtpmsEngine) -> None:
        powered.append(engine)
        start(engine)

    def child(job: Callable[[], bytes]) -> bytes:
        in_child.append(len(powered))
        return job()

    monkeypatch.setattr(worker, "_REHEARSALS", 0)  # but that which `gather` looks at
    monkeypatch.setattr(LibtpmsEngine, "start", note_power)
    monkeypatch.setattr(SocketServer, "resume", note_server)
    monkeypatch.setattr(rehearsal, "in_child", child)
    # trio would find none of its own any more in which an interrupt of this process has to wait.
    monkeypatch.setattr(rehearsal, "gather", lambda play: play())
    before = held()
    practice = worker.prepare()
    assert practice is not None
    assert in_child == [0]  # the zygote itself has powered none on
    assert len(powered) == len(served) == 1
    assert unpacked(practice.task.saved, range(4)).vtpm.running
    assert not Path(practice.listener.getsockname()).exists()
    trio.run(worker._rehearse, practice)
    assert held() <= before
    assert len(powered) == len(served) == 2
    assert not any(engine.running for engine in powered)


@pytest.mark.parametrize("kind", [Report.FAILED, Report.DONE])
def test_a_worker_that_says_something_else_is_found_out(kind: Report) -> None:
    async def serve(hearing: Hearing, _: Managers) -> None:
        assert await hearing.receive() is not None
        await hearing.say(Message(kind))

    with pytest.raises(ExceptionGroup) as caught:
        rehearsal.prepare(serve, 1)
    assert caught.group_contains(ChannelError, match="SERVING")


def test_what_cannot_be_rehearsed_is_done_for_the_first_time_then(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(*_: object) -> None:
        await trio.lowlevel.checkpoint()
        raise OSError(24, "no descriptor")

    monkeypatch.setattr(worker, "_obey", fail)
    assert worker.prepare() is None
    assert "cannot be rehearsed" in caplog.text


def test_a_child_that_fails_is_found_out(recwarn: pytest.WarningsRecorder) -> None:
    _ = recwarn  # of a fork beside threads that earlier tests have left
    assert rehearsal.in_child(lambda: b"made") == b"made"
    with pytest.raises(ChannelError, match="to practise with"):
        rehearsal.in_child(lambda: os._exit(3))


def test_what_has_run_does_the_same_by_code_that_was_made_anew() -> None:
    def inner(number: int) -> int:
        return number + 1

    def ran() -> None:
        numbers.append(inner(1))

    def other() -> None:
        numbers.append(0)

    numbers: list[int] = []
    before = [function.__code__ for function in (inner, ran, other)]
    rehearsal.gather(ran)
    ran()
    assert numbers == [2, 2]
    after = [function.__code__ for function in (inner, ran, other)]
    assert after == before
    kept = [one is another for one, another in zip(after, before, strict=True)]
    assert kept == [False, False, True]
