"""Where messages go, which of them, and how they look."""

from __future__ import annotations

import itertools
import logging
import os
from typing import TYPE_CHECKING

import pytest

from vtpm_cuse.config import LogConfig
from vtpm_cuse.errors import UsageError
from vtpm_cuse.service.process import logs

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

log = logging.getLogger("vtpm_cuse.test")


@pytest.fixture(autouse=True)
def _silent_afterwards() -> Iterator[None]:
    root = logging.getLogger("vtpm_cuse")
    level, propagate = root.level, root.propagate
    yield
    logs.configure(LogConfig(path="-"))
    root.setLevel(level)
    root.propagate = propagate


def say_everything() -> None:
    log.error("an error")
    log.warning("a warning")
    log.info("good news")
    for level in range(2, 9):
        log.log(logs.logging_level(level), "level %d", level)


def written(path: Path, config: LogConfig) -> list[str]:
    logs.configure(config)
    say_everything()
    return path.read_text().splitlines()


def test_by_default_the_operator_reads_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    logs.configure(LogConfig())
    say_everything()
    assert capfd.readouterr() == ("", "swtpm: an error\nswtpm: a warning\nswtpm: good news\n")


@pytest.mark.parametrize("level", range(1, 9))
def test_level_and_indentation(tmp_path: Path, level: int) -> None:
    path = tmp_path / "log"
    lines = written(path, LogConfig(path=str(path), level=level, prefix="T: "))
    assert lines[:3] == ["T: an error", "T: a warning", "T: good news"]
    assert lines[3:] == [f"T: {' ' * (n - 1)}level {n}" for n in range(2, level + 1)]
    assert path.stat().st_mode & 0o777 == 0o600


def test_each_line_of_a_message_has_the_prefix(tmp_path: Path) -> None:
    path = tmp_path / "log"
    logs.configure(LogConfig(path=str(path), level=2, prefix="T: "))
    log.debug("dump\n%s", "00 01\n02")
    assert path.read_text() == "T:  dump\nT:  00 01\nT:  02\n"


def test_appends_unless_told_to_truncate(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("old\n")
    assert written(path, LogConfig(path=str(path), prefix=""))[:2] == ["old", "an error"]
    assert written(path, LogConfig(path=str(path), prefix="", truncate=True))[0] == "an error"


def test_minus_is_silence(capfd: pytest.CaptureFixture[str]) -> None:
    logs.configure(LogConfig(path="-", level=20))
    say_everything()
    assert capfd.readouterr() == ("", "")
    assert logs.engine_debug() is None


def test_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with path.open("wb") as file:
        assert written(path, LogConfig(fd=file.fileno(), prefix=""))[0] == "an error"
        logs.configure(LogConfig())
        file.write(b"still open")


def test_engine_logs_from_level_5(tmp_path: Path) -> None:
    logs.configure(LogConfig(level=4))
    assert logs.engine_debug() is None
    logs.configure(LogConfig(level=7, prefix="T: "))
    assert logs.engine_debug() == (2, 3, "T:     ")


def test_a_full_disk_stops_nobody() -> None:
    with open("/dev/full", "wb", buffering=0) as full:
        logs.configure(LogConfig(fd=full.fileno()))
        say_everything()


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "elsewhere")
    nowhere = str(tmp_path / "no" / "log")
    with pytest.raises(UsageError, match="Could not open logfile for writing: No such file"):
        logs.configure(LogConfig(path=nowhere))
    with pytest.raises(UsageError, match="Could not open logfile for writing: Too many levels"):
        logs.configure(LogConfig(path=str(link)))
    with pytest.raises(UsageError, match="descriptor 999: Bad file descriptor"):
        logs.configure(LogConfig(fd=999))
    reader = os.open(os.devnull, os.O_RDONLY)
    try:
        with pytest.raises(UsageError, match="reading only"):
            logs.configure(LogConfig(fd=reader))
    finally:
        os.close(reader)


# -- many messages of a kind --------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time of the log, in the one item."""
    now = [1000.0]
    monkeypatch.setattr("vtpm_cuse.service.process.logs.time.monotonic", lambda: now[0])
    return now


def flood(count: int) -> None:
    for number in range(count):
        log.error("Unknown command: 0x%08x of %d", number, number)


def test_messages_that_differ_in_numbers_alone_are_counted(
    tmp_path: Path, clock: list[float]
) -> None:
    path = tmp_path / "log"
    logs.configure(LogConfig(path=str(path), prefix="T: "))
    flood(1000)
    log.error("The disk is full")
    lines = path.read_text().splitlines()
    assert len(lines) == 11
    assert lines[9:] == ["T: Unknown command: 0x00000009 of 9", "T: The disk is full"]
    clock[0] += 11
    log.info("good news")
    told = path.read_text().splitlines()[11:]
    assert told == ["T: 990 more like this: Unknown command: N of N", "T: good news"]
    flood(3)
    assert len(path.read_text().splitlines()) == 16, "those that come later are written again"


def test_what_was_left_out_is_said_at_the_end(tmp_path: Path, clock: list[float]) -> None:
    path = tmp_path / "log"
    logs.configure(LogConfig(path=str(path), prefix=""))
    flood(12)
    assert clock
    logs.configure(LogConfig(path="-"))
    assert path.read_text().splitlines()[10:] == ["2 more like this: Unknown command: N of N"]


def test_different_errors_are_all_written(tmp_path: Path) -> None:
    path = tmp_path / "log"
    logs.configure(LogConfig(path=str(path), prefix=""))
    words = ["".join(pair) for pair in itertools.product("abcdefghijklmnop", repeat=2)]
    flood(100)
    for word in words:
        log.error("Could not write %s", word)
    lines = path.read_text().splitlines()
    assert [line for line in lines if "write" in line] == [f"Could not write {w}" for w in words]
    assert "90 more like this: Unknown command: N of N" in lines


def test_who_looks_closely_sees_all(tmp_path: Path) -> None:
    path = tmp_path / "log"
    logs.configure(LogConfig(path=str(path), level=2, prefix=""))
    for number in range(100):
        log.debug("length %d", number)
    assert len(path.read_text().splitlines()) == 100


def test_recent_messages_are_not_crowded_out() -> None:
    recent = logs.keep_recent()
    logging.getLogger("vtpm_cuse").setLevel(logging.INFO)
    log.error("The disk is full")
    flood(1000)
    assert b"The disk is full" in recent()


def test_a_terminal_that_shows_a_log_obeys_nobody(tmp_path: Path) -> None:
    path = tmp_path / "log"
    logs.configure(LogConfig(path=str(path), prefix=""))
    recent = logs.keep_recent()
    logging.getLogger("vtpm_cuse").error("no user '\x1b]0;x\x07\x9b2J'\n\tnext\ufffd")
    logs.configure(LogConfig(path="-"))
    wanted = "no user '\\u001b]0;x\\u0007\\u009b2J'\n\tnext\ufffd\n"
    assert path.read_text() == wanted
    assert recent().decode().endswith(wanted)
