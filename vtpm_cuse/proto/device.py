"""A device file of CUSE or FUSE: kernel requests in, replies and notifications out.

Sans-IO, in restricted ioctl mode. A request that cannot be answered yet waits
here until `wake`; INTERRUPT takes it away again, so no client ever hangs in a
state that cannot be killed. Source: linux/fuse.h.
"""

from __future__ import annotations

import errno
import os
import struct
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

from vtpm_cuse import faults
from vtpm_cuse.errors import FrontendError, VtpmError, WireError
from vtpm_cuse.wire.fuse import (
    FUSE_KERNEL_VERSION,
    FUSE_NOTIFY_POLL,
    FUSE_POLL_SCHEDULE_NOTIFY,
    CuseInitIn,
    FuseInHeader,
    FuseInitIn,
    FuseInterruptIn,
    FuseIoctlIn,
    FuseIoctlOut,
    FuseOpcode,
    FuseOpenFlag,
    FuseOpenOut,
    FuseOutHeader,
    FusePollIn,
    FusePollOut,
    FusePollWakeup,
    FuseReadWriteIn,
    FuseWriteOut,
)
from vtpm_cuse.wire.layout import HOST

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Retry = Callable[[], bytes | None]
    Handler = Callable[[memoryview, int], bytes | None]

Init = TypeVar("Init", CuseInitIn, FuseInitIn)

MAX_TRANSFER: Final = 1 << 16
"""Bytes of one READ or WRITE request; a longer system call arrives in pieces."""

READ_BUFFER_SIZE: Final = 1 << 17
"""Bytes that every read of the channel must offer: more than a WRITE with its headers."""

_IN, _OUT = FuseInHeader.compiled(HOST), FuseOutHeader.compiled(HOST)
_TRANSFER, _WRITTEN = FuseReadWriteIn.compiled(HOST), FuseWriteOut.compiled(HOST)
_DATA_AT: Final = FuseInHeader.SIZE + FuseReadWriteIn.SIZE
_WRITE_REPLY_SIZE: Final = FuseOutHeader.SIZE + FuseWriteOut.SIZE
_OPENED: Final = FuseOpenOut(
    fh=0,
    # A stream has no position, and so no lock of it that a waiting read would hold.
    open_flags=FuseOpenFlag.FOPEN_DIRECT_IO
    | FuseOpenFlag.FOPEN_NONSEEKABLE
    | FuseOpenFlag.FOPEN_STREAM,
).pack(HOST)
_IOCTL_DONE: Final = FuseIoctlOut(result=0, flags=0, in_iovs=0, out_iovs=0).pack(HOST)


class DeviceFile(Protocol):
    """What the session asks of the device. All raise DeviceError with the errno to give back."""

    def open(self) -> None:
        """As open(2)."""

    def release(self) -> None:
        """The last descriptor of an open is closed."""

    def write(self, data: bytes) -> None:
        """As write(2), taken whole."""

    def read(self, size: int, *, nonblocking: bool) -> bytes | Retry:
        """As read(2): data, empty at the end, or what to try again after a change."""

    def ioctl(self, number: int, argument: bytes, uid: int) -> bytes | Retry:
        """As ioctl(2) by user *uid*: the argument to give back, or what to try again."""

    def poll(self) -> int:
        """Events of poll(2) that hold now."""


class DeviceSession:
    """One device on one channel."""

    def __init__(self, file: DeviceFile) -> None:
        self._file = file
        self._waiting: dict[int, Retry] = {}
        self._poll_handles: set[int] = set()
        self._handlers: dict[int, Handler] = {
            FuseOpcode.FUSE_WRITE: self._write,
            FuseOpcode.FUSE_READ: self._read,
            FuseOpcode.FUSE_IOCTL: self._ioctl,
            FuseOpcode.FUSE_POLL: self._poll,
            FuseOpcode.FUSE_OPEN: self._open,
            FuseOpcode.FUSE_RELEASE: self._release,
            FuseOpcode.FUSE_INTERRUPT: self._interrupt,
        }

    def receive(self, message: memoryview) -> bytes | None:
        """One kernel request; returns the reply, or None while there is none to give.

        Raises:
            WireError: The message is too short for a request.
        """
        if len(message) < _IN.size:
            raise WireError("FuseInHeader", _IN.size, len(message))
        _, opcode, unique, nodeid, *_ = _IN.unpack_from(message)
        handler = self._handler(opcode, nodeid)
        if handler is None:
            return error_reply(unique, errno.ENOSYS)
        try:
            return handler(message, unique)
        except VtpmError as exc:
            return error_reply(unique, faults.errno_of(exc))
        except struct.error:  # the request is shorter than its structure
            return error_reply(unique, errno.EINVAL)

    def _handler(self, opcode: int, _nodeid: int) -> Handler | None:
        return self._handlers.get(opcode)

    def wake(self) -> Iterator[bytes]:
        """After a change of the device: replies to waiting requests, then poll notifications."""
        bug: Exception | None = None
        for unique, retry in list(self._waiting.items()):
            try:
                body = retry()
                message = None if body is None else reply_to(unique, body)
            except VtpmError as exc:
                message = error_reply(unique, faults.errno_of(exc))
            except Exception as exc:  # a bug of ours must not keep the others waiting
                bug = exc
                message = error_reply(unique, errno.EIO)
            if message is not None:
                del self._waiting[unique]
                yield message
        while self._poll_handles:
            wakeup = FusePollWakeup(self._poll_handles.pop()).pack(HOST)
            yield _OUT.pack(_OUT.size + len(wakeup), FUSE_NOTIFY_POLL, 0) + wakeup
        if bug is not None:
            raise bug

    # -- requests -------------------------------------------------------------------------

    def _write(self, message: memoryview, unique: int) -> bytes:
        size = _TRANSFER.unpack_from(message, _IN.size)[2]
        data = bytes(message[_DATA_AT : _DATA_AT + size])
        self._file.write(data)
        return _OUT.pack(_WRITE_REPLY_SIZE, 0, unique) + _WRITTEN.pack(len(data), 0)

    def _read(self, message: memoryview, unique: int) -> bytes | None:
        _, _, size, _, _, flags, _ = _TRANSFER.unpack_from(message, _IN.size)
        answer = self._file.read(size, nonblocking=bool(flags & os.O_NONBLOCK))
        if isinstance(answer, bytes):
            return reply_to(unique, answer)
        self._waiting[unique] = answer
        return None

    def _ioctl(self, message: memoryview, unique: int) -> bytes | None:
        request = FuseIoctlIn.unpack_untrusted(message[_IN.size :], HOST)
        start = _IN.size + FuseIoctlIn.SIZE
        argument = bytes(message[start : start + request.in_size])
        uid = _IN.unpack_from(message)[4]
        answer = self._file.ioctl(request.cmd, argument, uid)
        if isinstance(answer, bytes):
            return reply_to(unique, _IOCTL_DONE + answer)
        retry = answer

        def later() -> bytes | None:
            result = retry()
            return None if result is None else _IOCTL_DONE + result

        self._waiting[unique] = later
        return None

    def _poll(self, message: memoryview, unique: int) -> bytes:
        request = FusePollIn.unpack_untrusted(message[_IN.size :], HOST)
        if request.flags & FUSE_POLL_SCHEDULE_NOTIFY:
            self._poll_handles.add(request.kh)
        return reply_to(unique, FusePollOut(self._file.poll()).pack(HOST))

    def _open(self, _message: memoryview, unique: int) -> bytes:
        self._file.open()
        return reply_to(unique, _OPENED)

    def _release(self, _message: memoryview, unique: int) -> bytes:
        self._file.release()
        self._poll_handles.clear()
        return reply_to(unique, b"")

    def _interrupt(self, message: memoryview, _unique: int) -> bytes | None:
        """The interrupted request ends with EINTR; the interruption itself gets no reply."""
        target = FuseInterruptIn.unpack_untrusted(message[_IN.size :], HOST).unique
        if self._waiting.pop(target, None) is None:
            return None
        return error_reply(target, errno.EINTR)


def read_init(
    message: memoryview, kind: type[Init], opcode: FuseOpcode, channel: str
) -> tuple[int, Init]:
    """The kernel's first request on *channel*, a path: which it is, and what it says.

    Raises:
        FrontendError: It is no such request, or not one that can be answered.
    """
    try:
        _, found, unique, *_ = _IN.unpack_from(message)
        request = kind.unpack_untrusted(message[_IN.size :], HOST)
    except (struct.error, WireError) as exc:
        name = opcode.name.removeprefix("FUSE_")
        raise FrontendError(f"{channel} sent no {name}") from exc
    if found != opcode or request.major != FUSE_KERNEL_VERSION:
        raise FrontendError(f"{channel} speaks FUSE {request.major}.{request.minor}, not 7")
    return unique, request


def error_reply(unique: int, number: int) -> bytes:
    """The request fails with errno *number*."""
    return _OUT.pack(_OUT.size, -number, unique)


def unique_of(message: memoryview) -> int:
    """Which request a message is."""
    return int(_IN.unpack_from(message)[2])


def reply_to(unique: int, body: bytes) -> bytes:
    """The request succeeds with *body*."""
    return _OUT.pack(_OUT.size + len(body), 0, unique) + body
