"""A vTPM's resource manager, and a device that is a client of it with each open.

The device's model is the kernel's own /dev/tpmrmN: a command is answered before the next is taken,
an answer that nobody fetches is dropped after two minutes, and there are no PTM requests.
"""

from __future__ import annotations

import errno
import functools
import select
import time
from typing import TYPE_CHECKING, Final

from vtpm_cuse.errors import DeviceError
from vtpm_cuse.resmgr.manager import Manager
from vtpm_cuse.vtpm import borrowed
from vtpm_cuse.wire.tpm import TPM_BUFFER_MAX, TPM_HEADER_SIZE, command_size

if TYPE_CHECKING:
    from collections.abc import Callable

    from vtpm_cuse.resmgr.manager import Connection
    from vtpm_cuse.vtpm.turn import Turn
    from vtpm_cuse.vtpm.vtpm import Vtpm

OPENS_MAX: Final = 64
"""Clients of one TPM: as many as it has sessions."""

_UNREAD_SECONDS: Final = 120.0
_READABLE: Final = select.POLLIN | select.POLLRDNORM
_WRITABLE: Final = select.POLLOUT | select.POLLWRNORM


class ManagedVtpm:
    """The clients of a vTPM that has a resource manager. For whoever has the TPM's turn.

    Attributes:
        begin: To be called first where `rests` says something.
        rests: Of a borrowed TPM, what is to be done in pauses (`borrowed.rests_of`).
    """

    def __init__(self, vtpm: Vtpm) -> None:
        self._vtpm = vtpm
        self._manager = Manager(vtpm, inner=vtpm.manage)
        self.begin: Callable[[], None] = lambda: None
        self.rests: borrowed.Rests = ()
        if (known := vtpm.options.borrowed) is not None:
            self._manager = shared = borrowed.manager_of(vtpm, known)
            self.begin = functools.partial(borrowed.begin, shared)
            self.rests = borrowed.rests_of(shared, known)
        self._starts = vtpm.starts
        vtpm.before_snapshot = self._manager.drop

    def share(self) -> None:
        """Somebody uses the TPM beside the manager, which then ends nothing that it did not begin."""
        self._manager.alone = False

    def connect(self) -> Connection:
        """A new client."""
        return self._manager.connect()

    def process(self, client: Connection, command: bytes, locality: int | None = None) -> bytes:
        """The response to a client's command, in a locality of its own if it names one."""
        vtpm = self._vtpm
        if vtpm.starts != self._starts:
            self._starts = vtpm.starts
            self._manager.reset()
        if locality is None:
            return client.process(command)
        before = vtpm.locality
        refusal = vtpm.enter_locality(locality)
        if refusal is not None:
            return refusal
        try:
            return client.process(command)
        finally:
            vtpm.set_locality(before)


class ManagedFile:
    """The file behind a managed device node (implements `proto.device.DeviceFile`).

    Args:
        vtpm: The TPM.
        managed: Its clients.
        turn: Of the TPM.
        on_change: Called when a waiting call may go on, or poll events changed.
        clock: In seconds.
    """

    def __init__(
        self,
        vtpm: Vtpm,
        managed: ManagedVtpm,
        turn: Turn,
        on_change: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.vtpm = vtpm
        self.managed = managed
        self.turn = turn
        self.on_change = on_change
        self.clock = clock
        self._opens: set[ManagedOpen] = set()
        self._written: list[ManagedOpen] = []

    def open(self) -> ManagedOpen:
        """A new client. Raises DeviceError EMFILE when there are too many."""
        if len(self._opens) >= OPENS_MAX:
            raise DeviceError(errno.EMFILE)
        found = ManagedOpen(self)
        self._opens.add(found)
        return found

    def resume(self, saved: None) -> ManagedOpen:
        """Its objects are gone, as after a reset of the TPM."""
        _ = saved
        return self.open()

    def closed(self, found: ManagedOpen) -> None:
        """It has no descriptor left."""
        self._opens.discard(found)

    def written(self, found: ManagedOpen) -> None:
        """It has taken a command, which `run_pending` executes."""
        self._written.append(found)

    def run_pending(self) -> None:
        """Executes what `write` took: here, or as a job when that may take long."""
        while self._written:
            self._written.pop().execute()


class ManagedOpen:
    """One client (implements `proto.device.Open`)."""

    def __init__(self, file: ManagedFile) -> None:
        self._file = file
        self._client: Connection | None = None
        self._command: bytes | None = None
        self._busy = self._released = self._touched = False
        self._response = memoryview(b"")
        self._answered = 0.0

    def write(self, data: bytes) -> None:
        """Takes a TPM command.

        Raises:
            DeviceError: E2BIG above 4096 bytes, EINVAL for one that is not whole, EBUSY while a
                command runs or before its response has been read.
        """
        if self._busy or self._command is not None or self._unread:
            raise DeviceError(errno.EBUSY)
        if len(data) > TPM_BUFFER_MAX:
            raise DeviceError(errno.E2BIG)
        if len(data) < TPM_HEADER_SIZE or command_size(data) > len(data):
            raise DeviceError(errno.EINVAL)
        self._command = data[: command_size(data)] if command_size(data) else data
        self._response = memoryview(b"")
        self._file.written(self)

    @property
    def _unread(self) -> bool:
        """Whether there is a response of which nothing has been read yet."""
        if self._touched or not self._response:
            return False
        if self._file.clock() - self._answered < _UNREAD_SECONDS:
            return True
        self._response = memoryview(b"")
        return False

    def execute(self) -> None:
        """What was written: here, or as a job."""
        command, self._command = self._command, None
        if command is None:
            return
        file = self._file
        if not file.turn.taken and not file.vtpm.is_long(command):
            self._respond(self._process(command))
            file.on_change()
            return
        self._busy = True
        file.turn.run(lambda: self._process(command), self._finish)

    def _process(self, command: bytes) -> bytes:
        if self._client is None:
            self._client = self._file.managed.connect()
        return self._file.managed.process(self._client, command)

    def _finish(self, response: bytes) -> None:
        self._busy = False
        self._respond(response)
        if self._released:
            self._leave()

    def _respond(self, response: bytes) -> None:
        self._response = memoryview(response)
        self._answered = self._file.clock()
        self._touched = False

    def read(self, size: int, *, nonblocking: bool) -> bytes | None:
        """The next part of the response; empty when there is none.

        Raises:
            DeviceError: EAGAIN when it would wait.
        """
        if self._busy:
            if nonblocking:
                raise DeviceError(errno.EAGAIN)
            return None
        _ = self._unread  # too old, perhaps
        part, self._response = self._response[:size], self._response[size:]
        self._touched = True
        return bytes(part)

    def poll(self) -> int:
        """Readable with a response, else writable, unless a command runs."""
        if self._busy:
            return 0
        _ = self._unread
        return _READABLE if self._response else _WRITABLE

    def ioctl(self, number: int, argument: bytes, call: int, uid: int) -> bytes | None:
        """Raises DeviceError: there are none."""
        _ = number, argument, call, uid
        raise DeviceError(errno.ENOTTY)

    def release(self) -> None:
        """The last descriptor is closed: what the client leaves ends, behind what it runs."""
        self._file.closed(self)
        self._released = True
        if not self._busy:
            self._leave()

    def _leave(self) -> None:
        client, self._client = self._client, None
        if client is None:
            return

        def close() -> bytes:
            client.close()
            return b""

        if self._file.turn.taken or self._file.vtpm.borrowed:
            self._file.turn.run(close, lambda _: None)
        else:
            close()

    def suspend(self) -> None:
        """A client's objects do not outlive the process."""
