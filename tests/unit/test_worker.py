"""The worker: jobs in their order, results in the trio thread, an end that waits."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import trio
import trio.testing

from tests.support.waiting import PATIENCE_SECONDS
from vtpm_cuse.serve.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


def with_worker(scenario: Callable[[Worker], Awaitable[None]]) -> None:
    async def main() -> None:
        worker = Worker()
        try:
            with trio.fail_after(PATIENCE_SECONDS):
                await scenario(worker)
        finally:
            worker.close()

    trio.run(main)


def test_jobs_run_elsewhere_and_end_here() -> None:
    async def scenario(worker: Worker) -> None:
        here = threading.get_ident()
        threads: list[int] = []
        over = trio.Event()

        def job() -> bytes:
            threads.append(threading.get_ident())
            return b"result"

        def done(result: bytes) -> None:
            assert result == b"result"
            threads.append(threading.get_ident())
            over.set()

        worker.submit(job, done)
        await over.wait()
        assert threads[0] != here
        assert threads[1] == here

    with_worker(scenario)


def test_jobs_keep_their_order_and_their_thread() -> None:
    async def scenario(worker: Worker) -> None:
        results: list[bytes] = []
        threads: set[int] = set()
        over = trio.Event()

        def done(result: bytes) -> None:
            results.append(result)
            if len(results) == 50:
                over.set()

        def job(number: int) -> bytes:
            threads.add(threading.get_ident())
            return b"%d" % number

        for number in range(50):
            worker.submit(lambda number=number: job(number), done)  # type: ignore[misc]
        await over.wait()
        assert results == [b"%d" % number for number in range(50)]
        assert len(threads) == 1

    with_worker(scenario)


def test_trio_goes_on_while_a_job_runs() -> None:
    async def scenario(worker: Worker) -> None:
        gate = threading.Event()
        over = trio.Event()

        def job() -> bytes:
            assert gate.wait(PATIENCE_SECONDS)
            return b""

        worker.submit(job, lambda _: over.set())
        for _ in range(10):
            await trio.lowlevel.checkpoint()
        assert not over.is_set()
        gate.set()
        await over.wait()

    with_worker(scenario)


def test_close_waits_for_the_job() -> None:
    ended = []

    async def scenario(worker: Worker) -> None:
        entered = threading.Event()
        gate = threading.Event()

        def job() -> bytes:
            entered.set()
            assert gate.wait(PATIENCE_SECONDS)
            ended.append(True)
            return b""

        worker.submit(job, lambda _: None)
        assert entered.wait(PATIENCE_SECONDS)
        threading.Timer(0, gate.set).start()

    with_worker(scenario)
    assert ended == [True]


def test_thread_is_gone_afterwards() -> None:
    async def scenario(_: Worker) -> None:
        assert "tpm-worker" in {thread.name for thread in threading.enumerate()}

    with_worker(scenario)
    assert "tpm-worker" not in {thread.name for thread in threading.enumerate()}


def test_who_insists_is_heard_until_the_job_ends() -> None:
    async def scenario(worker: Worker) -> None:
        heard = threading.Semaphore(0)

        def job() -> bytes:  # deaf to the first two
            return b"".join(b"x" for _ in range(3) if heard.acquire(timeout=PATIENCE_SECONDS))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(worker.run, job, lambda: None)
            await trio.testing.wait_all_tasks_blocked()
            await worker.repeat_until_ended(heard.release)

    with_worker(scenario)


def test_nobody_insists_without_a_job() -> None:
    async def scenario(worker: Worker) -> None:
        calls: list[bool] = []
        await worker.repeat_until_ended(lambda: calls.append(True))
        assert await worker.run(lambda: b"done", lambda: None) == b"done"
        await worker.repeat_until_ended(lambda: calls.append(True))
        assert calls == []

    with_worker(scenario)


def test_a_pause_has_its_steps_and_each_job_begins_them_anew() -> None:
    async def scenario(worker: Worker) -> None:
        done: list[str] = []
        rested = threading.Semaphore(0)

        def rest(name: str) -> Callable[[], None]:
            def step() -> None:
                done.append(name)
                rested.release()
                if name == "second":
                    raise RuntimeError("a fault of ours")

            return step

        worker.rest_by(((0.0, rest("first")), (0.0, rest("second"))))
        for number in range(2):
            assert await worker.run(lambda: b"job", lambda: None) == b"job"
            for _ in range(2):
                assert rested.acquire(timeout=PATIENCE_SECONDS)
            assert done == ["first", "second"] * (number + 1)

    with_worker(scenario)


def test_nothing_rests_while_jobs_wait() -> None:
    async def scenario(worker: Worker) -> None:
        order: list[str] = []
        begun, go, over = threading.Event(), threading.Event(), threading.Event()

        def rest() -> None:
            order.append("rest")
            over.set()

        worker.rest_by(((0.0, rest),))

        def first() -> None:
            begun.set()
            assert go.wait(PATIENCE_SECONDS)
            order.append("first")

        worker.run_later(first)
        assert begun.wait(PATIENCE_SECONDS)
        worker.run_later(lambda: order.append("second"))
        over.clear()
        order.clear()
        go.set()
        assert over.wait(PATIENCE_SECONDS)
        assert order[:3] == ["first", "second", "rest"]

    with_worker(scenario)
