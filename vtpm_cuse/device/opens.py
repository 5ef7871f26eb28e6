"""What a client sees of the device through open, read, write, ioctl and poll.

Once for CUSE and FUSE, and synchronous: a call that must wait returns what to
try again after the next change, and `on_change` says when that is. A command
that `write` takes is executed by `run_pending`, which the frontend calls after
it has answered the write: nothing can come between, and on two processors the
client wakes up while the TPM works.

The model is the kernel's own /dev/tpmN. Where a client of the C suite's device
would notice a difference, the C suite's behaviour counts.
"""

from __future__ import annotations

import errno
import logging
import select
from typing import TYPE_CHECKING, Final

from vtpm_cuse import faults
from vtpm_cuse.device.ptm import ANSWERED_WHILE_BUSY, CAPABILITIES, PtmService
from vtpm_cuse.errors import DeviceError, PtmError, VtpmError
from vtpm_cuse.wire.blob import INCOMING_BLOB_MAX
from vtpm_cuse.wire.layout import HOST
from vtpm_cuse.wire.ptm import (
    PTM_IOCTLS,
    PTM_SPECS,
    PTM_STATE_BLOB_SIZE,
    PtmBlobType,
    PtmCapabilityIoctl,
    PtmCommand,
    PtmGetStateRequest,
    PtmGetStateResponse,
    PtmLockStorageRequest,
    PtmResult,
    PtmResultResponse,
    PtmSetStateRequest,
    PtmStateFlag,
)
from vtpm_cuse.wire.tpm import TPM_BUFFER_MAX

if TYPE_CHECKING:
    from collections.abc import Callable

    from vtpm_cuse.device.vtpm import Vtpm
    from vtpm_cuse.wire.layout import WireStruct

    Retry = Callable[[], bytes | None]
    Submit = Callable[[Callable[[], bytes], Callable[[bytes], None]], None]

log = logging.getLogger(__name__)

_SUCCESS: Final = PtmResultResponse(PtmResult.TPM_SUCCESS).pack(HOST)
_READABLE: Final = select.POLLIN | select.POLLRDNORM
_WRITABLE: Final = select.POLLOUT | select.POLLWRNORM


class TpmDeviceFile:
    """The file behind a device node; one open at a time.

    Args:
        vtpm: The TPM.
        ptm: Answers the ioctls.
        submit: Runs a job elsewhere, then a function with its result here.
        on_change: Called when a waiting call may go on, or poll events changed.

    Attributes:
        is_open: Somebody has the device open.
        busy: A job runs.
        cancelling: It has been asked to end. libtpms forgets a cancellation that comes before
            it has begun with the command, so the frontend repeats it until `busy` is over.
        pending: The command that `run_pending` executes.
    """

    def __init__(
        self, vtpm: Vtpm, ptm: PtmService, submit: Submit, on_change: Callable[[], None]
    ) -> None:
        self._vtpm = vtpm
        self._ptm = ptm
        self._submit = submit
        self._on_change = on_change
        self.is_open = False
        self.busy = False
        self.cancelling = False
        self.pending: bytes | None = None
        self._response = memoryview(b"")
        self._outgoing: _OutgoingBlob | None = None
        self._incoming: _IncomingBlob | None = None

    # -- open, write, read, poll ----------------------------------------------------------

    def open(self) -> None:
        """Raises DeviceError EBUSY while somebody else has it open.

        PEER: an unread response outlives the open that asked for it, as there.
        """
        if self.is_open:
            raise DeviceError(errno.EBUSY)
        self.is_open = True

    def release(self) -> None:
        """The last descriptor is closed; a running command runs on."""
        self.is_open = False
        self._outgoing = self._incoming = None

    def write(self, data: bytes) -> None:
        """Takes a TPM command, or a part of a state blob; an unread response is discarded.

        Raises:
            DeviceError: E2BIG above 4096 bytes, EBUSY while a command runs, EIO when a blob
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
        if self.busy:
            raise DeviceError(errno.EBUSY)
        if len(data) > TPM_BUFFER_MAX:
            # PEER: cuts the command silently and lets the TPM answer to the rest of it.
            raise DeviceError(errno.E2BIG)
        self.pending = data

    def run_pending(self) -> None:
        """Executes what `write` took: here, or as a job when it may take long."""
        command, self.pending = self.pending, None
        if command is None:
            return
        response = self._vtpm.process_known(command)
        if response is None and self._vtpm.is_long(command):
            self._start_job(lambda: self._vtpm.process(command), self._respond)
            return
        self._respond(self._vtpm.process(command) if response is None else response)
        self._on_change()

    def _respond(self, response: bytes) -> None:
        self._response = memoryview(response)

    def read(self, size: int, *, nonblocking: bool) -> bytes | Retry:
        """The next part of the response or blob; empty when there is none.

        Raises:
            DeviceError: EAGAIN when it would wait, EIO when a blob is being written.
        """
        if self.busy:
            if nonblocking:
                raise DeviceError(errno.EAGAIN)
            return lambda: None if self.busy else self._read_now(size)
        return self._read_now(size)

    def _read_now(self, size: int) -> bytes:
        if self._incoming is not None:
            self._incoming = None
            raise DeviceError(errno.EIO)
        if self._outgoing is not None and self._outgoing.reading:
            part = self._outgoing.read(size)
            self._release_behind(self._outgoing)
            return part
        part = bytes(self._response[:size])
        self._response = self._response[size:]
        return part

    def poll(self) -> int:
        """Readable with something unread, writable when no command runs."""
        if self.busy:
            return 0
        unread = len(self._response) > 0 or self._reading_blob
        return _WRITABLE | (_READABLE if unread else 0)

    @property
    def _reading_blob(self) -> bool:
        return self._outgoing is not None and self._outgoing.reading

    # -- ioctl ----------------------------------------------------------------------------

    def ioctl(self, number: int, argument: bytes) -> bytes | Retry:
        """A PTM request with its host-endian structure.

        Raises:
            DeviceError: EINVAL for any other number.
            WireError: The argument is too short.
        """
        command = PTM_IOCTLS.get(number)
        if command is None or command is PtmCommand.PTM_SET_DATAFD:
            raise DeviceError(errno.EINVAL)
        request = PTM_SPECS[command].request.unpack_untrusted(argument, HOST)
        if isinstance(request, PtmLockStorageRequest):
            return self._lock_storage(request)
        if self.busy and command not in ANSWERED_WHILE_BUSY:
            return lambda: None if self.busy else self._answer(command, request).pack(HOST)
        return self._answer(command, request).pack(HOST)

    def _answer(self, command: PtmCommand, request: WireStruct) -> WireStruct:
        match request:
            case PtmGetStateRequest():
                return self._get_blob(request)
            case PtmSetStateRequest():
                return self._set_blob(request)
        if command is PtmCommand.PTM_GET_CAPABILITY:
            return PtmCapabilityIoctl(CAPABILITIES)
        if command is PtmCommand.PTM_CANCEL_TPM_CMD:
            self.cancelling = self.busy
        if command is PtmCommand.PTM_INIT:
            self._incoming = None  # what is written from now on is for the TPM
        if command is PtmCommand.PTM_STOP:
            self._response = memoryview(b"")
        return self._ptm.handle(command, request)

    def _get_blob(self, request: PtmGetStateRequest) -> WireStruct:
        """PEER: hands out its first snapshot for ever; here offset 0 takes a new one."""
        try:
            self._ptm.check_state(PtmCommand.PTM_GET_STATEBLOB)
            blob = self._outgoing
            if blob is None or request.offset == 0 or blob.key != _blob_key(request):
                blob = self._outgoing = _OutgoingBlob(self._vtpm, request)
            answer = blob.part(request.offset)
            self._release_behind(blob)
            return answer
        except VtpmError as exc:
            self._outgoing = None
            return PtmGetStateResponse(faults.tpm_result(exc), 0, 0, 0, b"")

    def _release_behind(self, blob: _OutgoingBlob) -> None:
        """Behind the last blob of a migration the state may be another process', if so wanted."""
        last = blob.key[0] == PtmBlobType.PTM_BLOB_TYPE_SAVESTATE
        if last and blob.taken and self._vtpm.options.release_outgoing:
            self._vtpm.release_storage()

    def _set_blob(self, request: PtmSetStateRequest) -> WireStruct:
        try:
            self._ptm.check_state(PtmCommand.PTM_SET_STATEBLOB)
            if self._incoming is None or self._incoming.type != request.type:
                self._incoming = _IncomingBlob(request)
                if request.length == 0:  # the rest comes by write()
                    return PtmResultResponse(PtmResult.TPM_SUCCESS)
            if self._incoming.add(request):
                return PtmResultResponse(PtmResult.TPM_SUCCESS)
            blob, self._incoming = self._incoming, None
            self._vtpm.import_blob(blob.type, blob.flags, bytes(blob.data))
        except VtpmError as exc:
            self._incoming = None
            log.error("State blob refused: %s", exc)
            return PtmResultResponse(faults.tpm_result(exc))
        return PtmResultResponse(PtmResult.TPM_SUCCESS)

    def _lock_storage(self, request: PtmLockStorageRequest) -> bytes | Retry:
        """One try here, the retries as a job; never two at once, which would break a POSIX lock."""
        done: list[bytes] = []
        job_started = False

        def attempt() -> bytes | None:
            nonlocal job_started
            if not job_started and (not self.busy or self._vtpm.holds_lock):
                once = self._ptm.handle(command, PtmLockStorageRequest(0)).pack(HOST)
                if once == _SUCCESS or request.retries == 0:
                    return once
                job_started = True
                self._start_job(lambda: self._ptm.handle(command, request).pack(HOST), done.append)
            return done[0] if done else None

        command = PtmCommand.PTM_LOCK_STORAGE
        answer = attempt()
        return attempt if answer is None else answer

    def _start_job(self, job: Callable[[], bytes], done: Callable[[bytes], None]) -> None:
        def finish(result: bytes) -> None:
            self.busy = self.cancelling = False
            done(result)
            self._on_change()

        self.busy = True
        self._submit(job, finish)


class _OutgoingBlob:
    """A snapshot of a state blob on its way out, by ioctl in parts of 3072 bytes or by read()."""

    def __init__(self, vtpm: Vtpm, request: PtmGetStateRequest) -> None:
        self.key = _blob_key(request)
        decrypted = bool(request.state_flags & PtmStateFlag.PTM_STATE_FLAG_DECRYPTED)
        self._flags, self._blob = vtpm.export_blob(request.type, decrypted=decrypted)
        self._position = 0
        self.reading = False

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


def _blob_key(request: PtmGetStateRequest) -> tuple[int, int]:
    return request.type, request.state_flags & PtmStateFlag.PTM_STATE_FLAG_DECRYPTED


class _IncomingBlob:
    """A state blob on its way in, by ioctl in parts of 3072 bytes or by write()."""

    def __init__(self, first: PtmSetStateRequest) -> None:
        self.type, self.flags = first.type, first.state_flags
        self.data = bytearray()

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
