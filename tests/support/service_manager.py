"""A stand-in for systemd: what it passes to a service, hears of it, and keeps for it (sd_notify(3))."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Final, Self

from tests.support.programs import module_of
from tests.support.sockets import environment, listener
from tests.support.waiting import PATIENCE_SECONDS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_AS_PASSED: Final = """
import os, sys
names, fds = sys.argv[1], [int(fd) for fd in sys.argv[2].split(",")]
for number, fd in enumerate([os.dup(fd) for fd in fds]):
    os.dup2(fd, 3 + number)
    os.set_inheritable(3 + number, True)
os.closerange(3 + len(fds), 256)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(fds)), LISTEN_FDNAMES=names)
os.execv(sys.executable, [sys.executable, *sys.argv[3:]])
"""
"""Does what systemd does: descriptors from 3 on, none behind them, and three variables."""
_READ_SIZE: Final = 4096


def started(
    names: str, fds: Sequence[int], *words: str, stderr: int | None = None, **more: str
) -> subprocess.Popen[bytes]:
    """A program of Python's that is given these descriptors, and more variables."""
    return subprocess.Popen(
        [sys.executable, "-c", _AS_PASSED, names, ",".join(map(str, fds)), *words],
        stdin=subprocess.DEVNULL,
        stderr=stderr,
        pass_fds=fds,
        env={**environment(), **more},
    )


class Service:
    """`vtpmd` as a service: it may end and be started again, and what it has stored is kept.

    Attributes:
        path: Where it is asked.
        process: Of the one that was started last.
    """

    process: subprocess.Popen[bytes]

    def __init__(self, folder: Path, *words: str) -> None:
        self._folder, self._words = folder, words
        self.path = folder / "manager.sock"
        self._listener = listener(self.path)
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(str(folder / "notify"))
        self._notify.settimeout(PATIENCE_SECONDS)
        self._kept: list[tuple[str, int]] = []
        self._log = (folder / "log").open("a+")

    def start(self, before: str = "") -> None:
        """It is ready, behind what is to be run *before*."""
        code = f"import sys; {before}\nfrom {module_of('vtpmd')} import main; sys.exit(main())"
        names = ("manager", *(name for name, _ in self._kept))
        self.process = started(
            ":".join(names),
            [self._listener.fileno(), *(fd for _, fd in self._kept)],
            *("-c", code, "--state", str(self._folder / "state")),
            *("--run", str(self._folder / "run"), *self._words),
            stderr=self._log.fileno(),
            NOTIFY_SOCKET=str(self._folder / "notify"),
            FDSTORE="8",
        )
        self.hear("READY=1")

    def hear(self, word: str) -> None:
        """Waits until it has said that, and does what it says until then."""
        said: list[str] = []
        while word not in said:
            data, fds, *_ = socket.recv_fds(self._notify, _READ_SIZE, 8, socket.MSG_CMSG_CLOEXEC)
            said = data.decode().splitlines()
            name = next((one[7:] for one in said if one.startswith("FDNAME=")), "stored")
            if "FDSTORE=1" in said:
                self._kept += [(name, fd) for fd in fds]
            elif "FDSTOREREMOVE=1" in said:
                self._drop(name)

    def _drop(self, *names: str) -> None:
        for name, fd in self._kept:
            if name in names:
                os.close(fd)
        self._kept = [(name, fd) for name, fd in self._kept if name not in names]

    def end(self) -> int:
        """As before a restart; its exit status."""
        self.process.terminate()
        return self.process.wait(PATIENCE_SECONDS)

    def kill(self) -> None:
        """At once."""
        self.process.kill()
        self.process.wait(PATIENCE_SECONDS)

    def forget(self) -> None:
        """What systemd does when a service was stopped, and not started again: nothing is kept."""
        self._drop(*(name for name, _ in self._kept))

    @property
    def said(self) -> str:
        """Its log."""
        self._log.seek(0)
        return self._log.read()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            sys.stderr.write(self.said)
        self.kill()
        self.forget()
        self._notify.close()
        self._listener.close()
        self._log.close()
