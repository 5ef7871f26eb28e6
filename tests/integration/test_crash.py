"""kill -9 at any moment, and a full disk at any step: what was acknowledged is there, and whole."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest

from tests.integration.crash_child import Counter
from vtpm_cuse import files
from vtpm_cuse.storage import directory, linear

ROOT = Path(__file__).parents[2]


class Life:
    """One process that counts in a TPM's NVRAM."""

    def __init__(self, version: str, uri: str, *options: str) -> None:
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.integration.crash_child"),
                *(version, uri, *options),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def hear(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        if not line:
            _, complaint = self.process.communicate()
            pytest.fail(f"the TPM did not come up again:\n{complaint}", pytrace=False)
        return line

    def found(self) -> int:
        assert [self.hear(), self.hear()] == ["begin", "powered"]
        word, number = self.hear().split()
        assert word == "start"
        return int(number)

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def kill(self) -> list[int]:
        """SIGKILL; what it had still said."""
        self.process.kill()
        assert self.process.stdout is not None
        rest = self.process.stdout.read()  # communicate() alone would miss what is buffered here
        self.process.communicate()
        return [int(line) for line in rest.splitlines(keepends=True) if line.endswith("\n")]


PLACES: Final = {
    "directory": ("dir://{}", ()),
    "directory with backup": ("dir://{}", ("backup",)),
    "directory with key": ("dir://{}", ("key={}.key",)),
    "file": ("file://{}/state.bin", ()),
    "file with key": ("file://{}/state.bin", ("key={}.key",)),
}
places = pytest.mark.parametrize("place", PLACES)


def words_of(place: str, folder: Path) -> list[str]:
    """URI and options; the key is in a file beside the folder."""
    uri, options = PLACES[place]
    folder.with_name(f"{folder.name}.key").write_text("2a" * 16)
    return [uri.format(folder), *(word.format(folder) for word in options)]


def live_and_die(chance: random.Random, words: list[str], lives: int) -> int:
    """Kills each life while it writes as fast as it can; returns what was acknowledged last."""
    acknowledged, most = 0, 0
    for number in range(lives):
        life = Life("2", *words)
        found = life.found()
        assert acknowledged <= found <= most, f"life {number}"
        acknowledged = found
        life.tell("run")
        for _ in range(1 + chance.randrange(6)):
            acknowledged = int(life.hear())
        acknowledged = max([acknowledged, *life.kill()])
        most = acknowledged + 1
    return acknowledged


@places
def test_killed_while_it_writes(place: str, tmp_path: Path) -> None:
    folder = tmp_path / "state"
    folder.mkdir()
    chance = random.Random(place)  # noqa: S311 - repeatable, not secret
    words = words_of(place, folder)
    assert live_and_die(chance, words, lives=6) >= 6
    assert {path.name for path in folder.iterdir()} <= {
        *{".lock", "tpm2-00.permall", "tpm2-00.permall.bak", "state.bin"},
        *{"TMP2-00.permall", "TMP2-00.permall.bak"},
    }


def test_killed_and_then_only_the_backup_is_left(tmp_path: Path) -> None:
    """It is the generation before, or of the same number: a command may store more than once."""
    folder = tmp_path / "state"
    folder.mkdir()
    words = words_of("directory with backup", folder)
    chance = random.Random(3)  # noqa: S311 - repeatable, not secret
    for _ in range(2):
        acknowledged = live_and_die(chance, words, lives=1)
        for path in folder.glob("*.permall"):
            path.unlink()
        life = Life("2", *words)
        found = life.found()
        assert acknowledged - 1 <= found <= acknowledged + 1
        life.kill()
        for path in folder.iterdir():
            path.unlink()


_TAKES_ROOM: Final = {
    *("open", "write", "pwrite", "link"),
    *("replace", "fsync", "fdatasync", "posix_fallocate"),
}


class FullDisk:
    """Stands in for ``os`` below a store: from one of its calls on, until `restart`, all is full.

    Attributes:
        at: Number of the call that is the first to fail; None for never.
        calls: How many calls there were that take room.
    """

    def __init__(self) -> None:
        self.at: int | None = None
        self.calls = 0

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever os has
        real = getattr(os, name)
        if name not in _TAKES_ROOM:
            return real

        def call(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            if name == "open" and not args[1] & os.O_CREAT:
                return real(*args, **kwargs)
            self.calls += 1
            if self.at is not None and self.calls > self.at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **kwargs)

        return call


@places
def test_disk_is_full_at_any_step_of_a_write(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "state"
    folder.mkdir()
    uri, *options = words_of(place, folder)
    key = next((word[4:] for word in options if word.startswith("key=")), None)
    disk = FullDisk()
    for module in (directory, linear, files):
        monkeypatch.setattr(module, "os", disk)

    def start() -> Counter:
        return Counter(uri, tpm2=True, backup="backup" in options, key=key)

    counter = start()
    counter.prepare()
    counter.write(1)
    disk.calls = 0
    counter.write(2)
    steps = disk.calls
    assert steps > 3
    number = 2
    for at in range(steps + 1):
        disk.calls, disk.at = 0, at
        try:
            counter.write(number + 1)
            told = False
        except AssertionError:  # the TPM's answer is no success
            told = True
        assert told == (at < steps), f"step {at} of {steps}"
        disk.at = None
        counter.close()
        counter = start()
        found = counter.read()
        assert found == number + 1 or (told and found == number), f"step {at} of {steps}"
        number = found
        counter.write(number)
    counter.close()


def test_killed_as_soon_as_it_is_told_to_write(tmp_path: Path) -> None:
    """TPM 1.2, which permits 64 writes without an owner."""
    chance = random.Random(12)  # noqa: S311 - repeatable, not secret
    acknowledged, most = 0, 0
    for lives in range(6):
        life = Life("1.2", f"dir://{tmp_path}")
        found = life.found()
        assert acknowledged <= found <= most, f"life {lives}"
        acknowledged = found
        for _ in range(chance.randrange(3)):
            life.tell("once")
            acknowledged = int(life.hear())
        life.tell("once")
        acknowledged = max([acknowledged, *life.kill()])
        most = acknowledged + 1


def test_killed_before_it_is_up(tmp_path: Path) -> None:
    """While the TPM is being made and prepared, too: every next life starts."""
    chance = random.Random(7)  # noqa: S311 - repeatable, not secret
    for folder in (tmp_path / "a", tmp_path / "b", tmp_path / "c"):
        folder.mkdir()
        for _ in range(5):
            life = Life("2", f"dir://{folder}")
            for _ in range(chance.randrange(3)):
                life.hear()
            life.process.kill()
            life.process.communicate()
        life = Life("2", f"dir://{folder}")
        assert life.found() == 0
        life.kill()
