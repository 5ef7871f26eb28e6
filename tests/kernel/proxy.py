"""A server on a TPM device of the kernel's, and the kernel's events to wait for."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from tests.kernel.harness import PATIENCE, PROGRAMS, popen

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator

    from tests.support.zygote import Forked

SWTPM: Final = str(PROGRAMS / "swtpm")
LINE: Final = re.compile(r"New TPM device: /dev/tpm([0-9]+) \(major/minor = ([0-9]+)/([0-9]+)\)\n")
_NETLINK_KOBJECT_UEVENT: Final = 15


class Uevents:
    """What the kernel says about devices, from now on."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, _NETLINK_KOBJECT_UEVENT)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        self._socket.bind((0, 1))

    def close(self) -> None:
        self._socket.close()

    def wait(self, action: str, *names: str) -> None:
        """Until each of the devices has been added or removed."""
        missing, deadline = set(names), time.monotonic() + PATIENCE
        while missing:
            self._socket.settimeout(max(0.0, deadline - time.monotonic()))
            what, _, path = self._socket.recv(65536).split(b"\0")[0].decode().partition("@")
            if what == action:
                missing.discard(path.rpartition("/")[2])


@contextmanager
def uevents() -> Iterator[Uevents]:
    events = Uevents()
    try:
        yield events
    finally:
        events.close()


def next_number() -> int:
    """Of the next device: the kernel takes the lowest that is free."""
    return min(set(range(64)) - {int(path.name[3:]) for path in Path("/dev").glob("tpm[0-9]*")})


@dataclass
class Proxy:
    """``swtpm chardev --vtpm-proxy``, in the foreground.

    Attributes:
        folder: Holds state, log, pid file and control channel.
        tpm2: TPM 2.0 rather than 1.2.
        more: Further arguments.
        start: A program and its arguments that ours is started by.
    """

    folder: Path
    tpm2: bool = True
    more: tuple[str, ...] = ()
    start: tuple[str, ...] = ()
    number: int = -1
    line: str = ""
    process: subprocess.Popen[bytes] | Forked = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(exist_ok=True)
        self.state = self.folder / "state"
        self.state.mkdir(exist_ok=True)
        self.log, self.control = self.folder / "log", self.folder / "ctrl"

    @property
    def arguments(self) -> list[str]:
        words = [*self.start, SWTPM, "chardev", "--vtpm-proxy", *(["--tpm2"] if self.tpm2 else [])]
        words += ["--tpmstate", f"dir={self.state}", "--log", f"file={self.log}"]
        return [*words, "--ctrl", f"type=unixio,path={self.control}", *self.more]

    @property
    def names(self) -> tuple[str, ...]:
        plain = f"tpm{self.number}"
        return (plain, f"tpmrm{self.number}") if self.tpm2 else (plain,)

    @property
    def device(self) -> Path:
        """For one client at a time."""
        return Path(f"/dev/tpm{self.number}")

    @property
    def shared(self) -> Path:
        """With the kernel's resource manager."""
        return Path(f"/dev/tpmrm{self.number}")

    @property
    def sysfs(self) -> Path:
        return Path(f"/sys/class/tpm/tpm{self.number}")

    def begin(self) -> None:
        """Starts it; on return it has said which device it is."""
        self.process = popen(*self.arguments)
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline().decode()
        found = LINE.fullmatch(self.line)
        assert found, (self.line, self.process.communicate(timeout=PATIENCE), self.said)
        self.number = int(found[1])

    def __enter__(self) -> Self:
        """Starts it; on return its devices are there."""
        with uevents() as events:
            self.begin()
            try:
                events.wait("add", *self.names)
            except BaseException:
                self.process.kill()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.returncode is None:
            self.end(signal.SIGKILL)

    def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        """By a signal; then no device is left. Returns the exit status."""
        self.process.send_signal(how)
        return self.ended()

    def ended(self) -> int:
        """The exit status, once it has ended; no device is left then."""
        status = self.process.wait(timeout=PATIENCE)
        out, err = self.process.communicate(timeout=PATIENCE)
        assert (out, err) == (b"", b"")
        assert not self.device.exists()
        assert not self.shared.exists()
        assert not self.sysfs.exists()
        assert "Traceback" not in self.said, self.said
        return status

    @property
    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))
