"""kill -9 at random moments: what was acknowledged is there afterwards, and whole."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


class Life:
    """One process that counts in a TPM's NVRAM."""

    def __init__(self, version: str, uri: str) -> None:
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.integration.crash_child"),
                *(version, uri),
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


@pytest.mark.parametrize("backend", ["dir", "file"])
def test_killed_while_it_writes(backend: str, tmp_path: Path) -> None:
    uri = f"dir://{tmp_path}" if backend == "dir" else f"file://{tmp_path}/state.bin"
    chance = random.Random(20261121)  # noqa: S311 - repeatable, not secret
    acknowledged, most = 0, 0
    for lives in range(40):
        life = Life("2", uri)
        found = life.found()
        assert acknowledged <= found <= most, f"life {lives}"
        acknowledged = found
        life.tell("run")
        for _ in range(chance.randrange(6)):
            acknowledged = int(life.hear())
        acknowledged = max([acknowledged, *life.kill()])
        most = acknowledged + 1
    assert acknowledged > 40
    assert {path.name for path in tmp_path.iterdir()} <= {
        *{".lock", "tpm2-00.permall", "TMP2-00.permall", "state.bin"}
    }


def test_killed_as_soon_as_it_is_told_to_write(tmp_path: Path) -> None:
    """TPM 1.2, which permits 64 writes without an owner."""
    chance = random.Random(12)  # noqa: S311 - repeatable, not secret
    acknowledged, most = 0, 0
    for lives in range(20):
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
    for directory in (tmp_path / "a", tmp_path / "b", tmp_path / "c"):
        directory.mkdir()
        for _ in range(5):
            life = Life("2", f"dir://{directory}")
            for _ in range(chance.randrange(3)):
                life.hear()
            life.process.kill()
            life.process.communicate()
        life = Life("2", f"dir://{directory}")
        assert life.found() == 0
        life.kill()
