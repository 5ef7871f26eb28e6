"""A manager as a program."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from functools import partial
from typing import TYPE_CHECKING, Self

from tests.support.programs import module_of
from tests.support.sockets import environment, listens
from tests.support.waiting import PATIENCE_SECONDS, wait_until
from vtpm_cuse.client.manager import Manager
from vtpm_cuse.errors import FrontendError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Daemon:
    """One with its folders below another, behind what is to be run *before*."""

    def __init__(self, folder: Path, *words: str, before: str = "") -> None:
        self.folder = folder
        self.path = folder / "run/manager.sock"
        self._log = (folder / "log").open("a+")
        code = f"import sys; {before}\nfrom {module_of('vtpmd')} import main; sys.exit(main())"
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-c", code, *words),
                *("--state", str(folder / "state"), "--run", str(folder / "run")),
            ],
            stdin=subprocess.DEVNULL,
            stderr=self._log,
            env=environment(),
        )

    @property
    def said(self) -> str:
        self._log.seek(0)
        return self._log.read()

    def wait_for_it(self, seconds: float) -> None:
        listening, log = partial(listens, self.path), self.folder / "log"
        wait_until(listening, "the manager", process=self.process, log=log, seconds=seconds)

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            sys.stderr.write(self.said)
        self.process.kill()
        self.process.wait()
        self._log.close()


@contextlib.contextmanager
def running(
    folder: Path, *words: str, before: str = "", seconds: float = PATIENCE_SECONDS
) -> Iterator[Daemon]:
    """One that listens, within so many seconds."""
    with Daemon(folder, *words, before=before) as daemon:
        daemon.wait_for_it(seconds)
        yield daemon


def begin_anew(daemon: Daemon) -> None:
    """Waits until the program has left its place, or has found that it cannot."""
    with Manager(str(daemon.path)) as manager:
        events = manager.watch()
        daemon.process.send_signal(signal.SIGUSR2)
        with contextlib.suppress(FrontendError):
            list(events)
