"""A vTPM's resource manager, and a device that is a client of it with each open.

The device's model is the kernel's own /dev/tpmrmN: a command is answered before the next is taken,
an answer that nobody fetches is dropped after two minutes, and there are no PTM requests.
"""

from __future__ import annotations

import contextlib
import errno
import json
import select
import time
from typing import TYPE_CHECKING, Final, NamedTuple

from vtpm_cuse.errors import DeviceError, PtmError
from vtpm_cuse.resmgr import view
from vtpm_cuse.resmgr.manager import Manager
from vtpm_cuse.resmgr.quota import Limits
from vtpm_cuse.vtpm import borrowed
from vtpm_cuse.vtpm.clients import (
    Client,
    Peer,
    SavedClient,
    SavedClients,
    described,
)
from vtpm_cuse.wire.ptm import PtmResult
from vtpm_cuse.wire.tpm import (
    TPM_HEADER_SIZE,
    TpmRc,
    command_size,
    response_code,
    succeeded,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from vtpm_cuse.proto.device import Opener
    from vtpm_cuse.resmgr.shared import SharedManager
    from vtpm_cuse.vtpm.turn import Turn
    from vtpm_cuse.vtpm.vtpm import Vtpm

_UNREAD_SECONDS: Final = 120.0
_ATTEMPTS: Final = 4  # the kernel's devices send a command again, too; libtpms wants one more
_READABLE: Final = select.POLLIN | select.POLLRDNORM
_WRITABLE: Final = select.POLLOUT | select.POLLWRNORM


class ManagedVtpm:
    """The clients of a vTPM that has a resource manager. For whoever has the TPM's turn.

    Args:
        vtpm: The TPM.
        clock: In seconds.

    Attributes:
        limits: What clients may have, and how many there may be.
        rests: Of a borrowed TPM, what is to be done in pauses (`borrowed.rests_of`).
    """

    def __init__(self, vtpm: Vtpm, clock: Callable[[], float] = time.monotonic) -> None:
        self._vtpm = vtpm
        self.clock = clock
        self._clients: dict[int, Client] = {}
        self.limits = Limits(**dict(vtpm.options.limits))
        self._manager = Manager(vtpm, inner=vtpm.manage, limits=self.limits)
        self.rests: borrowed.Rests = ()
        self._shared: SharedManager | None = None
        if (known := vtpm.options.borrowed) is not None:
            self._manager = self._shared = borrowed.manager_of(vtpm, known, self.limits)
            self.rests = borrowed.rests_of(self._shared, known)
        self._starts = vtpm.starts
        self._manager.reset(resumed=vtpm.resumed)
        vtpm.before_snapshot = self._manager.drop
        vtpm.on_startup = self._on_startup
        vtpm.on_given = self._manager.note_given

    def begin(self) -> None:
        """To be called first: learns what the TPM is like, unless somebody would notice."""
        if self._shared is not None:
            borrowed.begin(self._shared)
            return
        with contextlib.suppress(DeviceError), self._vtpm.asked_at_start():
            self._manager.learn()

    def _on_startup(self) -> None:
        self._starts = self._vtpm.starts
        self._manager.reset(resumed=self._vtpm.resumed)
        self.begin()

    def share(self) -> None:
        """Somebody uses the TPM beside the manager, which then ends nothing that it did not begin."""
        self._manager.alone = False

    def connect(self, peer: Peer) -> Client:
        """A new client. This alone needs no turn."""
        now = self.clock()
        found = Client(self._manager.connect(peer.uid), peer, now, now)
        self._clients[found.connection.number] = found
        return found

    def close(self, client: Client) -> None:
        """It has gone."""
        self._clients.pop(client.connection.number, None)
        client.connection.close()

    def holds(self, client: Client) -> bool:
        """Whether it has an object or a session."""
        self._notice_reset()
        return view.holds(self._manager, client.connection)

    def suspend(self) -> SavedClients:
        """The clients as plain values, before the TPM is suspended; they are not used any more."""
        self._notice_reset()
        now = self.clock()
        clients = tuple(
            SavedClient(number, one.peer, now - one.since, now - one.heard)
            for number, one in self._clients.items()
        )
        return SavedClients(self._manager.suspend(), clients)

    def resume(self, saved: SavedClients) -> None:
        """Goes on where *saved* was suspended, with a TPM that does; before anything else."""
        self._manager.resume(saved.manager)
        now = self.clock()
        for one in saved.clients:
            connection = self._manager.connections[one.number]
            client = Client(connection, one.peer, now - one.connected, now - one.idle)
            self._clients[one.number] = client

    def client(self, number: int) -> Client:
        """The one that had this number when all were suspended."""
        return self._clients[number]

    def describe(self) -> bytes:
        """JSON text about the clients and what they have; see `clients.described`."""
        self._notice_reset()
        return json.dumps(described(self._manager, self._clients.values(), self.clock())).encode()

    def flush(self, number: int, handle: int) -> None:
        """Ends an object or session of a client, or with a handle of 0 all that it has.

        A number of 0 stands for those who have left saved sessions and are gone. Raises PtmError
        where there is no such thing.
        """
        self._notice_reset()
        if not view.end(self._manager, number or None, handle or None):
            raise PtmError(PtmResult.TPM_BAD_PARAMETER)

    def _notice_reset(self) -> None:
        if self._vtpm.starts != self._starts:
            self._starts = self._vtpm.starts
            self._manager.reset(resumed=self._vtpm.resumed)

    def process(self, client: Client, command: bytes, locality: int | None = None) -> bytes:
        """The response to a client's command, in a locality of its own if it names one."""
        vtpm, connection = self._vtpm, client.connection
        client.heard = self.clock()
        self._notice_reset()
        if locality is None:
            return connection.process(command)
        before = vtpm.locality
        refusal = vtpm.enter_locality(locality)
        if refusal is not None:
            return refusal
        try:
            return connection.process(command)
        finally:
            vtpm.set_locality(before)

    def process_known(self, client: Client, command: bytes) -> bytes | None:
        """As `process`, by a shorter way; None, with nothing done, where that has more to look at.

        See `Vtpm.process_known`; a command that has failed may be given again.
        """
        vtpm, connection = self._vtpm, client.connection
        if vtpm.starts != self._starts:
            return None
        response = vtpm.process_known(command, connection.passed_on)
        if response is None or not succeeded(response):
            return None
        connection.commands += 1
        client.heard = self.clock()
        return response


class SavedManagedOpen(NamedTuple):
    """An open of a managed device between two commands, as plain values.

    Attributes:
        client: Its number.
        response: What is unread of the last response.
        answered: Seconds since that came.
        touched: Whether some of it has been read.
    """

    client: int
    response: bytes
    answered: float
    touched: bool


class ManagedFile:
    """The file behind a managed device node (implements `proto.device.DeviceFile`).

    Args:
        vtpm: The TPM.
        managed: Its clients.
        turn: Of the TPM.
        on_change: Called when a waiting call may go on, or poll events changed.
    """

    def __init__(
        self,
        vtpm: Vtpm,
        managed: ManagedVtpm,
        turn: Turn,
        on_change: Callable[[], None],
    ) -> None:
        self.vtpm = vtpm
        self.managed = managed
        self.turn = turn
        self.on_change = on_change
        self._opens: set[ManagedOpen] = set()
        self._written: list[ManagedOpen] = []

    def open(self, opener: Opener) -> ManagedOpen:
        """A new client.

        Raises:
            DeviceError: EMFILE when its user has too many, ENFILE when there are too many in all.
        """
        limits = self.managed.limits
        if sum(found.uid == opener.uid for found in self._opens) >= limits.clients_of_a_user:
            raise DeviceError(errno.EMFILE)
        if len(self._opens) >= limits.clients:
            raise DeviceError(errno.ENFILE)
        peer = Peer("device", pid=opener.pid, uid=opener.uid)
        found = ManagedOpen(self, self.managed.connect(peer))
        self._opens.add(found)
        return found

    def resume(self, saved: SavedManagedOpen) -> ManagedOpen:
        """An open as it was suspended, of a client that was resumed before."""
        found = ManagedOpen(self, self.managed.client(saved.client))
        found.resume(saved)
        self._opens.add(found)
        return found

    def closed(self, found: ManagedOpen) -> None:
        """It has no descriptor left."""
        self._opens.discard(found)

    @property
    def at_rest(self) -> bool:
        """Whether no client is in the middle of something."""
        return not self._written and all(one.at_rest for one in self._opens)

    def written(self, found: ManagedOpen) -> None:
        """It has taken a command, which `run_pending` executes."""
        self._written.append(found)

    def run_pending(self) -> None:
        """Executes what `write` took: here, or as a job when that may take long."""
        while self._written:
            self._written.pop().execute()


class ManagedOpen:
    """One client (implements `proto.device.Open`).

    Attributes:
        uid: Its user.
    """

    def __init__(self, file: ManagedFile, client: Client) -> None:
        self._file = file
        self._client = client
        self.uid = client.peer.uid
        self._command: bytes | None = None
        self._busy = self._released = self._touched = False
        self._response = memoryview(b"")
        self._answered = 0.0

    def write(self, data: bytes) -> None:
        """Takes a TPM command.

        Raises:
            DeviceError: E2BIG above the TPM's `buffer_max`, EINVAL for one that is not whole or flushes an
                object that is not there, EBUSY while a command runs or before its response has
                been read.
        """
        if self._busy or self._command is not None or self._unread:
            raise DeviceError(errno.EBUSY)
        if len(data) > self._file.vtpm.buffer_max:
            raise DeviceError(errno.E2BIG)
        if len(data) < TPM_HEADER_SIZE or command_size(data) > len(data):
            raise DeviceError(errno.EINVAL)
        if self._client.connection.flushes_none(data):
            raise DeviceError(errno.EINVAL)
        self._command = data[: command_size(data)] if command_size(data) else data
        self._response = memoryview(b"")
        self._file.written(self)

    @property
    def _unread(self) -> bool:
        """Whether there is a response of which nothing has been read yet."""
        if self._touched or not self._response:
            return False
        if self._file.managed.clock() - self._answered < _UNREAD_SECONDS:
            return True
        self._response = memoryview(b"")
        return False

    @property
    def at_rest(self) -> bool:
        """Whether no command runs, and no answer is to be read, or nobody is about to."""
        if self._busy or self._command is not None:
            return False
        idle = self._file.managed.clock() - self._answered
        return not self._response or idle >= _UNREAD_SECONDS

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
        for _ in range(_ATTEMPTS):
            response = self._file.managed.process(self._client, command)
            if response_code(response) != TpmRc.TPM_RC_RETRY:
                break
        return response

    def _finish(self, response: bytes) -> None:
        self._busy = False
        self._respond(response)
        if self._released:
            self._leave()

    def _respond(self, response: bytes) -> None:
        self._response = memoryview(response)
        self._answered = self._file.managed.clock()
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
        def close() -> bytes:
            self._file.managed.close(self._client)
            return b""

        if self._file.turn.taken or self._file.vtpm.borrowed:
            self._file.turn.run(close, lambda _: None)
        else:
            close()

    def suspend(self) -> SavedManagedOpen:
        """As plain values, while no command runs."""
        idle = self._file.managed.clock() - self._answered
        number = self._client.connection.number
        return SavedManagedOpen(number, bytes(self._response), idle, self._touched)

    def resume(self, saved: SavedManagedOpen) -> None:
        """As it was suspended."""
        self._response, self._touched = memoryview(saved.response), saved.touched
        self._answered = self._file.managed.clock() - saved.answered
