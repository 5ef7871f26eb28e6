"""The waiting of the tests themselves: it ends at its deadline, and with the process."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.support.waiting import TooLateError, wait_until

if TYPE_CHECKING:
    from pathlib import Path


def test_looks_again() -> None:
    answers = iter([False, False, True])
    wait_until(lambda: next(answers), "the third answer")
    assert next(answers, None) is None


def test_ends_at_the_deadline() -> None:
    with pytest.raises(TooLateError, match=r"^a wonder: did not come about within 0\.01 s$"):
        wait_until(lambda: False, "a wonder", seconds=0.01)


@pytest.mark.parametrize("holds", [False, True])
def test_ends_with_the_process(tmp_path: Path, holds: bool) -> None:
    log = tmp_path / "log"
    log.write_text("what went wrong")
    process = subprocess.Popen(["sh", "-c", "exit 3"])
    process.wait()
    with pytest.raises(AssertionError, match=r"^a wonder: ended with 3\nwhat went wrong$"):
        wait_until(lambda: holds, "a wonder", process=process, log=log)
