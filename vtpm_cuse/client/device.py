"""An emulator as a child that serves a file in a FUSE mount, as programs want it that know no sockets.

There is no channel whose end would tell it that its parent has gone: the kernel does, by a signal.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import subprocess
import time
from typing import TYPE_CHECKING, Final, TypeVar

from vtpm_cuse.client.child import (
    ANNOUNCEMENT,
    END_SECONDS,
    START_SECONDS,
    ChildEmulator,
    Nest,
    program_environment,
    program_words,
)
from vtpm_cuse.client.ioctl import DeviceControl
from vtpm_cuse.errors import LabError
from vtpm_cuse.programs import find_program

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from vtpm_cuse.client.base import Control

T = TypeVar("T")

RAW: Final = "vtpm0"
MANAGED: Final = "vtpmrm0"
READY: Final = "ready"
NEST_NAMES: Final = (READY, ANNOUNCEMENT)
_READY_MAX: Final = 4096
_BUSY_SECONDS: Final = 1.0
_AGAIN_SECONDS: Final = 0.001
_GONE_SECONDS: Final = 0.05
"""How long who has found a file dead waits for the end of its process."""
# Whoever was killed before the kernel knew whom to tell of that is no parent any more.
_IF_NOT_TOO_LATE: Final = '[ "$PPID" = "$1" ] || exit 0; shift; exec "$@"'
_NOT_ENOUGH: Final = "With no setpriv of util-linux, nothing would end when this program is killed"


def _bound_to_us() -> list[str]:
    """Words before a command that the kernel sends SIGTERM when this thread has ended.

    setpriv, for between fork and exec Python code is no good where there are threads.

    Raises:
        LabError: There is no setpriv.
    """
    setpriv = find_program("setpriv")
    if setpriv is None:
        raise LabError(f"{_NOT_ENOUGH}: install the package util-linux")
    bound = [setpriv, "--pdeathsig", "TERM", "--"]
    return [*bound, "/bin/sh", "-c", _IF_NOT_TOO_LATE, "sh", str(os.getpid())]


def once_free(opening: Callable[[], T]) -> T:
    """What *opening* a device gives, when whoever has closed it a moment ago is known to have.

    The kernel tells a file system of that behind the back of close(), and nobody when it has.

    Raises:
        OSError: Of *opening*; EBUSY after a second.
    """
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            return opening()
        except OSError as exc:
            if exc.errno != errno.EBUSY or time.monotonic() > deadline:
                raise
        time.sleep(_AGAIN_SECONDS)


class DeviceEmulator(ChildEmulator):
    """A running ``swtpm fuse`` that belongs to this thread alone.

    Args:
        words: Options, all but those of the device.
        nest: It has to know `NEST_NAMES`; the mount comes beside it.
        pass_fds: Descriptors that *words* name.

    Attributes:
        folder: Where the files `RAW` and, of a TPM 2.0, `MANAGED` are.

    Raises:
        LabError: It does not start, for want of FUSE perhaps; with what it said.
    """

    # Not that of a socket's: it has other channels.
    def __init__(self, words: Iterable[str], nest: Nest, pass_fds: Iterable[int] = ()) -> None:
        self.folder = f"{nest.folder}.dev"
        self._messages = os.memfd_create("messages", os.MFD_CLOEXEC)
        self._ours = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        super(ChildEmulator, self).__init__()
        program = [*program_words("vtpm_cuse.cli.swtpm"), "fuse", *words, "--foreground"]
        try:
            self._ours.bind(nest.path(READY))
            self._process = subprocess.Popen(  # noqa: S603 - our own program
                [*_bound_to_us(), *program, "--name", RAW, "--mount", self.folder],
                stdin=subprocess.DEVNULL,
                stdout=self._messages,
                stderr=self._messages,
                cwd="/",
                env={**program_environment(), "NOTIFY_SOCKET": nest.path(READY)},
                pass_fds=[*pass_fds],
                start_new_session=True,
            )
        except OSError as exc:
            self.release()
            raise LabError(f"Could not start an emulator: {exc.strerror}") from exc
        except LabError:
            self.release()
            raise
        try:
            self._wait_until_ready()
        except OSError as exc:
            failure = self.failure("The emulator did not start", exc)
            self.kill()
            raise failure from exc

    def _wait_until_ready(self) -> None:
        """Raises OSError."""
        ended = os.pidfd_open(self._process.pid)
        try:
            poll = select.poll()
            poll.register(self._ours, select.POLLIN)
            poll.register(ended, select.POLLIN)
            events = {fd for fd, _ in poll.poll(START_SECONDS * 1000)}
        finally:
            os.close(ended)
        if not events:
            raise TimeoutError("it is not ready in time")
        if self._ours.fileno() not in events:
            raise ConnectionResetError
        self._ours.recv(_READY_MAX)

    @contextlib.contextmanager
    def control(self) -> Iterator[Control]:
        """The device as its user has it; nobody else has the raw file open meanwhile.

        Raises:
            OSError: Nobody is there; EBUSY while a client has it.
        """
        with once_free(lambda: DeviceControl(f"{self.folder}/{RAW}")) as control:
            yield control

    def _has_gone(self) -> bool:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_GONE_SECONDS)
        return self._process.poll() is not None

    def end(self) -> None:
        """Has it store its state and end; clients that have the device open do not keep it from that.

        Raises:
            LabError: It did not; it has ended all the same.
        """
        failure = None
        if self.ours and self._messages >= 0:
            self._terminate()
            if self._process.poll() != 0:
                failure = self.failure("The emulator did not end in order", TimeoutError())
        super().kill()
        if failure is not None:
            raise failure

    def kill(self) -> None:
        """Ends it; in order if it can, for only then the mount has gone when this returns."""
        if self.ours and self._messages >= 0:
            self._terminate()
        super().kill()

    def _terminate(self) -> None:
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_SECONDS)
