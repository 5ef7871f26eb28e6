"""Waiting for what announces itself by no event that a test could wait for."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PATIENCE_SECONDS: Final = 200
"""For tests that would otherwise hang; none depends on it."""

_INTERVAL_SECONDS: Final = 0.001


class Process(Protocol):
    """One that may end."""

    @property
    def returncode(self) -> int | None:
        """None before it has ended."""

    def poll(self) -> int | None:
        """Looks whether it has."""


class TooLateError(AssertionError):
    """Something did not come about in time."""


def wait_until(
    condition: Callable[[], bool],
    what: str,
    *,
    process: Process | None = None,
    log: Path | None = None,
    seconds: float = PATIENCE_SECONDS,
) -> None:
    """Looks again and again whether *condition* holds.

    Args:
        condition: What has to hold.
        what: Names it in the failure.
        process: Has to live until then; the wait fails at once when it has ended.
        log: Its log, shown in the failure.
        seconds: How long to wait at the most.

    Raises:
        TooLateError: It did not hold in time.
        AssertionError: The process has ended.
    """
    deadline = time.monotonic() + seconds
    while True:
        holds = condition()
        if process is not None and process.poll() is not None:
            raise AssertionError(f"{what}: ended with {process.returncode}{_text_of(log)}")
        if holds:
            return
        if time.monotonic() > deadline:
            raise TooLateError(f"{what}: did not come about within {seconds:g} s{_text_of(log)}")
        time.sleep(_INTERVAL_SECONDS)


def _text_of(log: Path | None) -> str:
    return f"\n{log.read_text(errors='replace')}" if log is not None and log.exists() else ""
