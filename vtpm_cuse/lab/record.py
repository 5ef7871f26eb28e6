"""The last commands of a private TPM and its responses, as its emulator captures them.

The capture goes through a pipe, so that nothing is between the TPM and its clients. A thread reads
now and then, for the emulator waits while the pipe is full.
"""

from __future__ import annotations

import fcntl
import os
import select
import threading
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from vtpm_cuse.client.child import Owned
from vtpm_cuse.wire.pcapng import CaptureReader

if TYPE_CHECKING:
    from vtpm_cuse.wire.pcapng import Exchange

_PIPE_SIZE: Final = 1 << 18
_GATHER_SECONDS: Final = 0.02
"""Between two looks of the thread: to be woken for each packet would cost the clients more than all
else. A TPM cannot fill the pipe meanwhile."""

_READ_SIZE: Final = 1 << 16
_END_SECONDS: Final = 5
"""For the thread's end: a copy of this process, of an unlucky moment, may have an end of the pipe."""


def traced_lines(exchanges: list[Exchange]) -> list[str]:
    """For people: what `wire.trace` says of each, without what passwords and secrets are in."""
    from vtpm_cuse.wire import trace  # for those that look

    return [
        trace.text(trace.decode(command, response, micros=micros, duration=duration))
        for micros, command, response, duration in exchanges
    ]


class Recorder(Owned):
    """Keeps the last exchanges.

    Args:
        count: How many.

    Attributes:
        fd: What the emulator writes to; `started` closes it.
    """

    def __init__(self, count: int) -> None:
        self._kept: deque[Exchange] = deque(maxlen=count)
        self._capture = CaptureReader()
        self._lock = threading.Lock()
        self._read_end, self.fd = os.pipe()
        self._identity = _identity(self._read_end)
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        os.set_blocking(self._read_end, False)
        with suppress(OSError):  # who may have no more has less room
            fcntl.fcntl(self.fd, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
        super().__init__()

    def started(self) -> None:
        """The emulator has it, and the only end to write to."""
        os.close(self.fd)
        self.fd = -1
        self._thread = threading.Thread(target=self._read, name="vtpm-lab-recorder", daemon=True)
        self._thread.start()

    def exchanges(self) -> list[Exchange]:
        """The last ones, among them all that have been answered by now."""
        with self._lock:
            self._drain()
            return [*self._kept, *self._capture.unanswered()]

    def clear(self) -> None:
        """Forgets what was before."""
        with self._lock:
            self._drain()
            self._kept.clear()

    def _read(self) -> None:
        poll = select.poll()
        poll.register(self._read_end, select.POLLIN)
        while True:
            poll.poll()
            self._over.wait(_GATHER_SECONDS)
            with self._lock:
                if not self._drain():
                    return

    def _drain(self) -> bool:
        """Takes what is there; False at the end, when the emulator has gone."""
        while self._read_end >= 0:
            try:
                data = os.read(self._read_end, _READ_SIZE) if self._is_there() else b""
            except BlockingIOError:
                return True
            except OSError:  # somebody else has closed it
                data = b""
            if not data:
                self._close()
            self._kept.extend(self._capture.feed(data))
        return False

    def release(self) -> None:
        """See `Owned`. In its own process the emulator has ended, and with it the thread."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        if self._thread is not None and self.ours:
            self._over.set()
            # What is opened next may have the number that the thread would close.
            self._thread.join(_END_SECONDS)
        else:
            self._close()

    def _close(self) -> None:
        if self._is_there():
            os.close(self._read_end)
        self._read_end = -1

    def _is_there(self) -> bool:
        """Whether the number is still the pipe's; somebody else may have closed it, and more."""
        try:
            return self._read_end >= 0 and _identity(self._read_end) == self._identity
        except OSError:
            return False


def _identity(fd: int) -> tuple[int, int]:
    found = os.fstat(fd)
    return found.st_dev, found.st_ino
