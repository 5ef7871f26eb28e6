"""Whose turn it is with a TPM that several files lead to: one job at a time, in order. Pure."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    Job = Callable[[], bytes]
    Done = Callable[[bytes], None]
    Submit = Callable[[Job, Done], None]


class Turn:
    """The TPM's.

    What takes no time may be done beside it, at once, while it is not `taken`.

    Args:
        submit: Runs a job elsewhere, then a function with its result here.

    Attributes:
        taken: A job runs.
    """

    def __init__(self, submit: Submit) -> None:
        self._submit = submit
        self._waiting: deque[tuple[Job, Done]] = deque()
        self._watchers: list[Callable[[], None]] = []
        self.taken = False

    def watch(self, on_change: Callable[[], None]) -> None:
        """It is called whenever a job has ended: what waited for that may go on."""
        self._watchers.append(on_change)

    def run(self, job: Job, done: Done) -> None:
        """Runs *job* elsewhere when those before it have ended, then *done* with its result here."""
        self._waiting.append((job, done))
        self._next()

    def _next(self) -> None:
        if self.taken or not self._waiting:
            return
        job, done = self._waiting.popleft()

        def finish(result: bytes) -> None:
            self.taken = False
            done(result)
            self._next()
            for on_change in self._watchers:
                on_change()

        self.taken = True
        self._submit(job, finish)
