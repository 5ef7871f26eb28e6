"""One long-lived thread for what takes long, so that the trio task stays responsive.

It exists from the start because a sandbox may forbid new threads later.
"""

from __future__ import annotations

import logging
import queue
import threading
from typing import TYPE_CHECKING, Final

import trio

if TYPE_CHECKING:
    from collections.abc import Callable


log = logging.getLogger(__name__)

_ABORT_SECONDS: Final = 0.01


class Worker:
    """Runs jobs one after the other; `run` is called from trio, for one job at a time.

    Args:
        begun: False for one that there will be no job for: it has no thread.
    """

    def __init__(self, *, begun: bool = True) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._jobs: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        # Not a daemon: the interpreter must not end below a running libtpms.
        self._rests: tuple[tuple[float, Callable[[], None]], ...] = ()
        self._thread = threading.Thread(target=self._work, name="tpm-worker")
        if begun:
            self._thread.start()
        self._ended = trio.Event()
        self._ended.set()

    def submit(self, job: Callable[[], bytes], done: Callable[[bytes], None]) -> None:
        """Runs *job* in the thread, then *done* with its result in the trio thread.

        What runs here turns its faults into bytes; a job that raises all the same has the
        result b"", and the thread lives on.
        """

        def run() -> None:
            try:
                result = job()
            except Exception:
                log.exception("A job failed")
                result = b""
            self._token.run_sync_soon(done, result)

        self._jobs.put(run)

    def run_later(self, job: Callable[[], object]) -> None:
        """Runs *job*, which is short and never raises, in the thread; nobody waits for it."""
        self._jobs.put(job)

    def rest_by(self, rests: tuple[tuple[float, Callable[[], None]], ...]) -> None:
        """From now on, what is done when no job has come for so many seconds, one after the other.

        A job that comes meanwhile waits for the one that runs; behind it all begins anew.
        """
        self._rests = rests

    async def run(self, job: Callable[[], bytes], abort: Callable[[], object]) -> bytes:
        """Runs *job* and returns its result.

        When the caller is cancelled meanwhile, *abort* is called until the job has ended: a
        running command is never abandoned.
        """
        results: list[bytes] = []
        self._ended = ended = trio.Event()

        def done(result: bytes) -> None:
            results.append(result)
            ended.set()

        self.submit(job, done)
        try:
            await ended.wait()
        except trio.Cancelled:
            with trio.CancelScope(shield=True):
                await self.repeat_until_ended(abort)
            raise
        return results[0]

    async def repeat_until_ended(self, abort: Callable[[], object]) -> None:
        """Calls *abort* again and again until the job of `run` has ended; not at all without one.

        libtpms forgets a cancellation that comes before it has begun with the command.
        """
        ended = self._ended
        while not ended.is_set():
            abort()
            with trio.move_on_after(_ABORT_SECONDS):
                await ended.wait()

    def close(self) -> None:
        """Waits for the jobs to end."""
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        job = self._jobs.get()
        while job is not None:
            job()
            job = self._next()

    def _next(self) -> Callable[[], object] | None:
        for seconds, rest in self._rests:
            try:
                return self._jobs.get(timeout=seconds)
            except queue.Empty:
                try:
                    rest()
                except Exception:  # the thread lives on, as above
                    log.exception("What a pause is for failed")
        return self._jobs.get()
