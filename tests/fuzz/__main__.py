"""``./setup fuzz [MINUTES] [TARGET...]``: explores each parser for its share of the time."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.fuzz.harness import CORPUS

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT: Final = Path(__file__).parents[2]
FOUND: Final = ROOT / ".cache" / "fuzz"
MINUTES: Final = 10.0
_RUNS: Final = re.compile(rb"^#(\d+)", re.MULTILINE)
_CRASHERS: Final = ("crash-", "timeout-", "oom-", "leak-")
_USAGE: Final = "usage: ./setup fuzz [MINUTES] [TARGET...]"


def _say(text: str) -> None:
    sys.stderr.write(f"fuzz: {text}\n")


def _wanted(words: list[str]) -> tuple[float, list[str]]:
    """Minutes and targets. Raises ValueError."""
    minutes = MINUTES
    if words and words[0].replace(".", "", 1).isdecimal():
        minutes = float(words[0])
        words = words[1:]
    there = sorted(path.name for path in CORPUS.iterdir())
    if unknown := [word for word in words if word not in there]:
        raise ValueError(f"there is no target '{unknown[0]}'; there are {' '.join(there)}")
    return minutes, words or there


def _crashers(folder: Path) -> set[Path]:
    return {path for path in folder.glob("*-*") if path.name.startswith(_CRASHERS)}


@contextlib.contextmanager
def _exploring(name: str, seconds: int, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "tests.fuzz.explore", name, str(seconds), str(folder)]
    with (folder / "log").open("wb") as log:
        # A session of its own: Ctrl-C is for this process alone, which ends the other.
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def explore(name: str, seconds: int) -> bool:
    """One target; whether something was found, which is said with how to see it again."""
    folder = FOUND / name
    folder.mkdir(parents=True, exist_ok=True)
    before, begin = _crashers(folder), time.monotonic()
    with _exploring(name, seconds, folder) as process:
        status = process.wait()
    said = (folder / "log").read_bytes()
    runs = [int(number) for number in _RUNS.findall(said)]
    took = time.monotonic() - begin
    _say(f"{name:16} {max(runs, default=0):>10,} executions in {took:4.0f} s")
    if status == 0:
        return False
    _say(f"{name}: ended with status {status}; all that was said is in {folder / 'log'}")
    for path in sorted(_crashers(folder) - before):
        _say(f"{name}: see it again with")
        _say(f"    {sys.executable} -m tests.fuzz.explore {name} {path.relative_to(ROOT)}")
    return True


def main(words: list[str]) -> int:
    """The exit status: 1 when something was found."""
    try:
        minutes, names = _wanted(words)
    except ValueError as exc:
        _say(f"{exc}\n{_USAGE}")
        return 2
    os.nice(10)
    seconds = max(1, round(60 * minutes / len(names)))
    found: list[str] = []
    try:
        _say(f"{len(names)} targets, {seconds} s each; what is found is kept in {FOUND}")
        found.extend(name for name in names if explore(name, seconds))
    except KeyboardInterrupt:
        _say("ended by SIGINT")
        return 1 if found else 130
    _say(f"found something in {' '.join(found)}" if found else "nothing was found")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
