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
    from vtpm_cuse.fleet.channel import BlockingChannel, Channel


def held() -> set[object]:
    """Descriptors and threads; those that earlier tests have left may go at any time."""
    gc.collect()
    return {*os.listdir("/proc/self/fd"), *threading.enumerate()}


def test_all_is_done_without_a_tpm_and_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    powered: list[object] = []
    served: list[object] = []
    resume = SocketServer.resume

    def note(server: SocketServer, saved: object) -> None:
        served.append(saved)
        resume(server, saved)  # type: ignore[arg-type]

    monkeypatch.setattr(worker, "_REHEARSALS", 1)
    monkeypatch.setattr(LibtpmsEngine, "start", powered.append)
    monkeypatch.setattr(SocketServer, "resume", note)
    before = held()
    practice = worker.prepare()
    assert practice is not None
    assert not Path(practice.listener.getsockname()).exists()
    practice.listener.close()
    assert held() <= before
    assert len(served) == 1
    assert not powered
    assert not unpacked(practice.saved, range(4)).vtpm.running


@pytest.mark.parametrize("kind", [Report.FAILED, Report.DONE])
def test_a_worker_that_says_something_else_is_found_out(kind: Report) -> None:
    async def serve(orders: Channel, _: BlockingChannel) -> None:
        await orders.send(Message(kind))

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
