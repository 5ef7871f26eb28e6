"""A systemd that runs beside process 1, in the lab or in a system of its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.kernel.harness import Done, run, wait_until

if TYPE_CHECKING:
    import subprocess


class Systemd:
    """A running systemd, and commands within it."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        wait_until(lambda: bool(children.read_text()), "systemd is started", process=process)
        self.pid = int(children.read_text())

    def call(self, *words: str, status: int | None = 0) -> Done:
        enter = ("nsenter", "-t", str(self.pid), "--mount", "--pid", "--cgroup", "--root", "--wd")
        return run(*enter, *words, status=status)

    def systemctl(self, *words: str, status: int | None = 0) -> str:
        done = self.call("systemctl", "--no-pager", *words, status=None)
        if status is not None and done.status != status:
            log = self.call("journalctl", "--no-pager", "--output=cat", "--lines=30", status=None)
            pytest.fail(f"{done}\n{log.stdout}")
        return done.stdout

    def show(self, unit: str, name: str) -> str:
        return self.systemctl("show", "--value", "-p", name, unit).strip()

    def main_pid(self, unit: str) -> int:
        """The unit's process, by its number outside."""
        inside = self.show(unit, "MainPID")
        for path in Path("/proc").glob("[0-9]*/status"):
            try:
                text = path.read_text()
            except OSError:
                continue
            numbers = text.partition("NSpid:")[2].partition("\n")[0].split()
            if len(numbers) == 2 and numbers[1] == inside:
                return int(path.parent.name)
        raise AssertionError(f"{unit} has no process")
