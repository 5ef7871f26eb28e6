"""What a client sees of the device through open, read, write, ioctl and poll.

Once for CUSE and FUSE, and synchronous: a call that must wait returns None, and
is made again when `on_change` says that something has changed. A command that
`write` takes is executed by `run_pending`, which the frontend calls after
it has answered the write: nothing can come between, and on two processors the
client wakes up while the TPM works.

The model is the kernel's own /dev/tpmN. Where a client of the C suite's device
would notice a difference, the C suite's behaviour counts.
"""

from __future__ import annotations

import errno
import logging
import select
from typing import TYPE_CHECKING, Final, NamedTuple

from vtpm_cuse import faults
from vtpm_cuse.errors import DeviceError, PtmError, StateMissing, VtpmError
from vtpm_cuse.vtpm.ptm import ANSWERED_WHILE_BUSY, CAPABILITIES, PtmService, text_part
from vtpm_cuse.wire.blob import INCOMING_BLOB_MAX
from vtpm_cuse.wire.layout import HOST
from vtpm_cuse.wire.ptm import (
    PTM_IOCTLS,
    PTM_SPECS,
    PTM_STATE_BLOB_SIZE,
    PtmBlobType,
    PtmCapabilityIoctl,
    PtmClientsRequest,
    PtmCommand,
    PtmGetStateRequest,
    PtmGetStateResponse,
    PtmLockStorageRequest,
    PtmResult,
    PtmResultResponse,
    PtmSetStateRequest,
    PtmStateFlag,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from vtpm_cuse.proto.device import Opener
    from vtpm_cuse.vtpm.turn import Turn
    from vtpm_cuse.vtpm.vtpm import Vtpm
    from vtpm_cuse.wire.layout import WireStruct

log = logging.getLogger(__name__)

_FOR_ALL: Final = frozenset(
    {
        PtmCommand.PTM_GET_CAPABILITY,
        PtmCommand.PTM_GET_TPMESTABLISHED,
        PtmCommand.PTM_CANCEL_TPM_CMD,
        PtmCommand.PTM_GET_CONFIG,
        PtmCommand.PTM_GET_INFO,
        PtmCommand.PTM_GET_CLIENTS,
        PtmCommand.PTM_FLUSH_CLIENT,
    }
)
"""Of the others, each is the platform's: power, locality and measurements, or the state."""
_SUCCESS: Final = PtmResultResponse(PtmResult.TPM_SUCCESS).pack(HOST)
_READABLE: Final = select.POLLIN | select.POLLRDNORM
_WRITABLE: Final = select.POLLOUT | select.POLLWRNORM


class SavedBlob(NamedTuple):
    """A state blob that is under way, with all that has come or is to go."""

    type: int
    flags: int
    data: bytes
    decrypted: int = 0
    position: int = 0
    reading: bool = False


class SavedOpen(NamedTuple):
    """What one client has under way: at most one blob in each direction, and a text about others."""

    outgoing: SavedBlob | None
    incoming: SavedBlob | None
    clients: bytes = b""


class TpmDeviceFile:
    """The file behind a device node; one open at a time.

    Args:
        vtpm: The TPM.
        ptm: Answers the ioctls.
        turn: Of the TPM, which other files may lead to.
        on_change: Called when a waiting call may go on, or poll events changed.
        owners: Users who may act as the platform and have the TPM's state; others may use the TPM.

    Attributes:
        busy: A job of this file's runs, or has to.
        cancelling: It has been asked to end. libtpms forgets a cancellation that comes before
            it has begun with the command, so the frontend repeats it until `busy` is over.
        pending: The command that `run_pending` executes.
        response: What is unread of the last response. PEER: it outlives the open that asked for
            it, as there.
    """

    def __init__(
        self,
        vtpm: Vtpm,
        ptm: PtmService,
        turn: Turn,
        on_change: Callable[[], None],
        owners: frozenset[int] = frozenset({0}),
    ) -> None:
        self.vtpm = vtpm
        self.ptm = ptm
        self._turn = turn
        self._on_change = on_change
        turn.watch(on_change)
        self.owners = owners
        self._open: TpmOpen | None = None
        self.busy = False
        self.cancelling = False
        self.pending: bytes | None = None
        self.response = memoryview(b"")
        self._locking: tuple[int, bytes | None] = (0, None)

    @property
    def is_open(self) -> bool:
        """Whether somebody has the device open."""
        return self._open is not None

    @property
    def at_rest(self) -> bool:
        """Whether no client is in the middle of something.

        What nobody has read who is gone by now is nobody's.
        """
        if self.busy or self.pending is not None:
            return False
        return self._open is None or not (self.response or self._open.under_way)

    @property
    def must_wait(self) -> bool:
        """Whether what asks the TPM has to wait for a command, of whatever file's."""
        return self._turn.taken or self.busy

    def open(self, opener: Opener | None = None) -> TpmOpen:
        """Raises DeviceError EBUSY while somebody else has it open."""
        _ = opener
        if self._open is not None:
            raise DeviceError(errno.EBUSY)
        self._open = TpmOpen(self)
        return self._open

    def resume(self, saved: SavedOpen) -> TpmOpen:
        """The open that was suspended so. Raises DeviceError as `open`."""
        found = self.open()
        found.resume(saved)
        return found

    def released(self) -> None:
        """The open one is no more; a running command runs on."""
        self._open = None

    def run_pending(self) -> None:
        """Executes what `write` took: here, or as a job when it may take long."""
        command, self.pending = self.pending, None
        if command is None:
            return
        response = None if self._turn.taken else self.vtpm.process_known(command)
        if response is None and (self._turn.taken or self.vtpm.is_long(command)):
            self._start_job(lambda: self.vtpm.process(command), self._respond)
            return
        self._respond(self.vtpm.process(command) if response is None else response)
        self._on_change()

    def _respond(self, response: bytes) -> None:
        self.response = memoryview(response)

    def lock_storage(self, request: PtmLockStorageRequest, call: int) -> bytes | None:
        """One try here, the retries as a job; never two at once, which would break a POSIX lock."""
        locking, result = self._locking
        if call == locking:
            return result
        if self._turn.taken and not self.vtpm.holds_lock:
            return None
        command = PtmCommand.PTM_LOCK_STORAGE
        once = self.ptm.handle(command, PtmLockStorageRequest(0)).pack(HOST)
        if once == _SUCCESS or request.retries == 0:
            return once

        def done(answer: bytes) -> None:
            self._locking = call, answer

        self._locking = call, None
        self._start_job(lambda: self.ptm.handle(command, request).pack(HOST), done)
        return None

    def _start_job(self, job: Callable[[], bytes], done: Callable[[bytes], None]) -> None:
        def finish(result: bytes) -> None:
            self.busy = self.cancelling = False
            done(result)

        self.busy = True
        self._turn.run(job, finish)


class TpmOpen:
    """What one client sees of a `TpmDeviceFile` (implements `proto.device.Open`)."""

    def __init__(self, file: TpmDeviceFile) -> None:
        self._file = file
        self._outgoing: _OutgoingBlob | None = None
        self._incoming: _IncomingBlob | None = None
        self._clients = b""

    @property
    def under_way(self) -> bool:
        """Whether a state blob comes or goes in parts."""
        incoming, outgoing = self._incoming, self._outgoing
        return incoming is not None or (outgoing is not None and not outgoing.taken)

    def suspend(self) -> SavedOpen:
        """What is under way, as plain values."""
        outgoing, incoming = self._outgoing, self._incoming
        return SavedOpen(
            None if outgoing is None else outgoing.saved(),
            None if incoming is None else incoming.saved(),
            self._clients,
        )

    def resume(self, saved: SavedOpen) -> None:
        """Goes on with what was under way."""
        if saved.outgoing is not None:
            self._outgoing = _OutgoingBlob(saved.outgoing)
        if saved.incoming is not None:
            self._incoming = _IncomingBlob(saved.incoming)
        self._clients = saved.clients

    # -- write, read, poll ----------------------------------------------------------------

    def release(self) -> None:
        """The last descriptor is closed; a running command runs on."""
        self._file.released()

    def write(self, data: bytes) -> None:
        """Takes a TPM command, or a part of a state blob; an unread response is discarded.

        Raises:
            DeviceError: E2BIG above the TPM's `buffer_max`, EBUSY while a command runs, EIO when a blob
                is being read.
        """
        if self._incoming is not None:
            incoming, self._incoming = self._incoming, None  # an error ends the transfer
            incoming.append(data)
            self._incoming = incoming
            return
        if self._reading_blob:
            self._outgoing = None
            raise DeviceError(errno.EIO)
        if self._file.busy:
            raise DeviceError(errno.EBUSY)
        if len(data) > self._file.vtpm.buffer_max:
            # PEER: cuts the command silently and lets the TPM answer to the rest of it.
            raise DeviceError(errno.E2BIG)
        self._file.pending = data

    def read(self, size: int, *, nonblocking: bool) -> bytes | None:
        """The next part of the response or blob; empty when there is none.

        Raises:
            DeviceError: EAGAIN when it would wait, EIO when a blob is being written.
        """
        if self._file.busy:
            if nonblocking:
                raise DeviceError(errno.EAGAIN)
            return None
        if self._incoming is not None:
            self._incoming = None
            raise DeviceError(errno.EIO)
        if self._outgoing is not None and self._outgoing.reading:
            part = self._outgoing.read(size)
            if self._outgoing.taken:
                self._release_behind(self._outgoing.key[0])
            return part
        response = self._file.response
        self._file.response = response[size:]
        return bytes(response[:size])

    def poll(self) -> int:
        """Readable with something unread, writable when no command runs."""
        if self._file.busy:
            return 0
        unread = len(self._file.response) > 0 or self._reading_blob
        return _WRITABLE | (_READABLE if unread else 0)

    @property
    def _reading_blob(self) -> bool:
        return self._outgoing is not None and self._outgoing.reading

    # -- ioctl ----------------------------------------------------------------------------

    def ioctl(self, number: int, argument: bytes, call: int, uid: int) -> bytes | None:
        """A PTM request with its host-endian structure, by user *uid*.

        Raises:
            DeviceError: EINVAL for any other number; EPERM for one of the owners only. PEER:
                whoever may open the device may do all, but there that is root alone.
            WireError: The argument is too short.
        """
        command = PTM_IOCTLS.get(number)
        if command is None or command is PtmCommand.PTM_SET_DATAFD:
            raise DeviceError(errno.EINVAL)
        if command not in _FOR_ALL and uid not in self._file.owners:
            raise DeviceError(errno.EPERM)
        request = PTM_SPECS[command].request.unpack_untrusted(argument, HOST)
        if isinstance(request, PtmLockStorageRequest):
            return self._file.lock_storage(request, call)
        if self._file.must_wait and command not in ANSWERED_WHILE_BUSY:
            return None
        return self._answer(command, request).pack(HOST)

    def _answer(self, command: PtmCommand, request: WireStruct) -> WireStruct:
        match request:
            case PtmGetStateRequest():
                return self._get_blob(request)
            case PtmSetStateRequest():
                return self._set_blob(request)
            case PtmClientsRequest():
                return self._get_clients(request)
        if command is PtmCommand.PTM_GET_CAPABILITY:
            return PtmCapabilityIoctl(CAPABILITIES)
        if command is PtmCommand.PTM_CANCEL_TPM_CMD:
            self._file.cancelling = self._file.busy
        if command is PtmCommand.PTM_INIT:
            self._incoming = None  # what is written from now on is for the TPM
        if command is PtmCommand.PTM_STOP:
            self._file.response = memoryview(b"")
        return self._file.ptm.handle(command, request)

    def _get_clients(self, request: PtmClientsRequest) -> WireStruct:
        """Offset 0 takes a new text, whose parts come one by one."""
        try:
            if request.offset == 0:
                self._clients = self._file.ptm.need_managed().describe()
            return text_part(self._clients, request.offset)
        except VtpmError as exc:
            return PtmResultResponse(faults.tpm_result(exc))

    def _get_blob(self, request: PtmGetStateRequest) -> WireStruct:
        """PEER: hands out its first snapshot for ever; here offset 0 takes a new one."""
        try:
            self._file.ptm.check_state(PtmCommand.PTM_GET_STATEBLOB)
            blob = self._outgoing
            if blob is None or request.offset == 0 or blob.key != _blob_key(request):
                blob = self._outgoing = _OutgoingBlob(_snapshot(self._file.vtpm, request))
            answer = blob.part(request.offset)
            if blob.taken:
                self._release_behind(request.type)
            return answer
        except VtpmError as exc:
            self._outgoing = None
            if isinstance(exc, StateMissing):  # a TPM 2.0 never has the last one
                self._release_behind(request.type)
            return PtmGetStateResponse(faults.tpm_result(exc), 0, 0, 0, b"")

    def _release_behind(self, kind: int) -> None:
        """Behind the last blob of a migration the state may be another process', if so wanted."""
        last = kind == PtmBlobType.PTM_BLOB_TYPE_SAVESTATE
        if last and self._file.vtpm.options.release_outgoing:
            self._file.vtpm.release_storage()

    def _set_blob(self, request: PtmSetStateRequest) -> WireStruct:
        try:
            self._file.ptm.check_state(PtmCommand.PTM_SET_STATEBLOB)
            if self._incoming is None or self._incoming.type != request.type:
                self._incoming = _IncomingBlob(SavedBlob(request.type, request.state_flags, b""))
                if request.length == 0:  # the rest comes by write()
                    return PtmResultResponse(PtmResult.TPM_SUCCESS)
            if self._incoming.add(request):
                return PtmResultResponse(PtmResult.TPM_SUCCESS)
            blob, self._incoming = self._incoming, None
            self._file.vtpm.import_blob(blob.type, blob.flags, bytes(blob.data))
        except VtpmError as exc:
            self._incoming = None
            log.error("State blob refused: %s", exc)
            return PtmResultResponse(faults.tpm_result(exc))
        return PtmResultResponse(PtmResult.TPM_SUCCESS)


class _OutgoingBlob:
    """A snapshot of a state blob on its way out, by ioctl in parts of 3072 bytes or by read()."""

    def __init__(self, saved: SavedBlob) -> None:
        self.key = saved.type, saved.decrypted
        self._flags, self._blob = saved.flags, saved.data
        self._position, self.reading = saved.position, saved.reading

    def saved(self) -> SavedBlob:
        """All of it as plain values."""
        kind, decrypted = self.key
        return SavedBlob(kind, self._flags, self._blob, decrypted, self._position, self.reading)

    @property
    def taken(self) -> bool:
        """Whether all of it has been delivered."""
        return self._position >= len(self._blob)

    def part(self, offset: int) -> PtmGetStateResponse:
        """Answers PTM_GET_STATEBLOB; read() goes on behind what is delivered here."""
        part = self._blob[offset : offset + PTM_STATE_BLOB_SIZE]
        self._position = min(offset, len(self._blob)) + len(part)
        self.reading = self._position < len(self._blob)
        return PtmGetStateResponse(
            PtmResult.TPM_SUCCESS, self._flags, len(self._blob), len(part), part
        )

    def read(self, size: int) -> bytes:
        """The rest by read(2); one that gets less than it asks for ends it."""
        part = self._blob[self._position : self._position + size]
        self._position += len(part)
        self.reading = len(part) == size
        return part


def _snapshot(vtpm: Vtpm, request: PtmGetStateRequest) -> SavedBlob:
    kind, decrypted = _blob_key(request)
    flags, blob = vtpm.export_blob(kind, decrypted=bool(decrypted))
    return SavedBlob(kind, flags, blob, decrypted)


def _blob_key(request: PtmGetStateRequest) -> tuple[int, int]:
    return request.type, request.state_flags & PtmStateFlag.PTM_STATE_FLAG_DECRYPTED


class _IncomingBlob:
    """A state blob on its way in, by ioctl in parts of 3072 bytes or by write()."""

    def __init__(self, saved: SavedBlob) -> None:
        self.type, self.flags = saved.type, saved.flags
        self.data = bytearray(saved.data)

    def saved(self) -> SavedBlob:
        """All of it as plain values."""
        return SavedBlob(self.type, self.flags, bytes(self.data))

    def add(self, request: PtmSetStateRequest) -> bool:
        """Takes an ioctl's part; returns whether more is to come."""
        if request.length > PTM_STATE_BLOB_SIZE:
            raise PtmError(PtmResult.TPM_BAD_PARAMETER, f"part of {request.length} bytes")
        self.append(request.data[: request.length])
        return request.length == PTM_STATE_BLOB_SIZE

    def append(self, data: bytes) -> None:
        """Takes bytes from write(). Raises DeviceError EFBIG: no TPM state is that large."""
        if len(self.data) + len(data) > INCOMING_BLOB_MAX:
            raise DeviceError(errno.EFBIG)
        self.data += data
