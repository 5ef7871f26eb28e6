"""A device file of CUSE or FUSE: kernel requests in, replies and notifications out.

Sans-IO, in restricted ioctl mode. Every open has a handle of its own, which all
later requests of that client carry. A request that cannot be answered yet waits
here, as the kernel sent it, and is tried again by `wake`; INTERRUPT takes it
away, so no client ever hangs in a state that cannot be killed. Source: linux/fuse.h.

By hand: pyfuse3 knows no CUSE, and hands on neither INTERRUPT, nor ioctl, nor a later O_NONBLOCK.
"""

from __future__ import annotations

import errno
import os
import struct
from typing import TYPE_CHECKING, Final, Generic, NamedTuple, Protocol, TypeVar

from vtpm_cuse import faults
from vtpm_cuse.errors import DeviceError, FrontendError, VtpmError, WireError
from vtpm_cuse.wire.fuse import (
    FUSE_KERNEL_VERSION,
    FUSE_NOTIFY_POLL,
    FUSE_NOTIFY_RESEND,
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

    Handler = Callable[[memoryview, int], bytes | None]

Init = TypeVar("Init", CuseInitIn, FuseInitIn)
Saved = TypeVar("Saved")
Saved_co = TypeVar("Saved_co", covariant=True)

MAX_TRANSFER: Final = 1 << 16
"""Bytes of one READ or WRITE request; a longer system call arrives in pieces."""

READ_BUFFER_SIZE: Final = 1 << 17
"""Bytes that every read of the channel must offer: more than a WRITE with its headers."""

_IN, _OUT = FuseInHeader.compiled(HOST), FuseOutHeader.compiled(HOST)
_TRANSFER, _WRITTEN = FuseReadWriteIn.compiled(HOST), FuseWriteOut.compiled(HOST)
_DATA_AT: Final = FuseInHeader.SIZE + FuseReadWriteIn.SIZE
_WRITE_REPLY_SIZE: Final = FuseOutHeader.SIZE + FuseWriteOut.SIZE
# A stream has no position, and so no lock of it that a waiting read would hold.
_DEVICE_FLAGS: Final = (
    FuseOpenFlag.FOPEN_DIRECT_IO | FuseOpenFlag.FOPEN_NONSEEKABLE | FuseOpenFlag.FOPEN_STREAM
)
_WITHOUT_REPLY: Final = frozenset(
    {FuseOpcode.FUSE_INTERRUPT, FuseOpcode.FUSE_FORGET, FuseOpcode.FUSE_BATCH_FORGET}
)
_IOCTL_DONE: Final = FuseIoctlOut(result=0, flags=0, in_iovs=0, out_iovs=0).pack(HOST)


class Opener(NamedTuple):
    """Who opens a device: the user, and the process, 0 where that is not to be seen from here."""

    uid: int
    pid: int


class Open(Protocol[Saved_co]):
    """What one client has open. All raise DeviceError with the errno to give back.

    A call that must wait returns None, with nothing done, and is made again after a change.
    """

    def write(self, data: bytes) -> None:
        """As write(2), taken whole."""

    def read(self, size: int, *, nonblocking: bool) -> bytes | None:
        """As read(2): data, empty at the end."""

    def ioctl(self, number: int, argument: bytes, call: int, uid: int) -> bytes | None:
        """As ioctl(2) by user *uid*: the argument to give back.

        *call* is the same when it is made again.
        """

    def poll(self) -> int:
        """Events of poll(2) that hold now."""

    def release(self) -> None:
        """The last descriptor of this open is closed."""

    def suspend(self) -> Saved_co:
        """What `DeviceFile.resume` makes the same open of, as plain values."""


class DeviceFile(Protocol[Saved]):
    """What the session asks of the device."""

    def open(self, opener: Opener) -> Open[Saved]:
        """As open(2). Raises DeviceError with the errno to give back."""

    def resume(self, saved: Saved) -> Open[Saved]:
        """An open as it was when it was suspended."""


class SavedDeviceSession(NamedTuple, Generic[Saved]):
    """A session between two requests, as plain values.

    Attributes:
        next_handle: The handle of the next open.
        opens: Handle, number of the file, and saved form of each open.
        waiting: The requests that wait, as the kernel sent them.
        polls: Poll handles to be notified, each with the open that asked.
        paths: In a mount, what the kernel's node ids stand for, from 0.
        texts: In a mount, handle and content of each open text.
        first_handle: Opens with lower ones are of a server that has died.
    """

    next_handle: int
    opens: tuple[tuple[int, int, Saved], ...]
    waiting: tuple[bytes, ...]
    polls: tuple[tuple[int, int], ...]
    paths: tuple[str, ...] = ()
    texts: tuple[tuple[int, bytes], ...] = ()
    first_handle: int = 1


class DeviceSession(Generic[Saved]):
    """One channel, to one device or, in a mount, several."""

    def __init__(self, *files: DeviceFile[Saved]) -> None:
        self._files = files
        self._opens: dict[int, Open[Saved]] = {}
        self._opened: dict[int, int] = {}  # handle to number of the file
        self._next_handle = self._first_handle = 1
        self._waiting: dict[int, bytes] = {}
        self._polls: dict[int, int] = {}
        self._handlers: dict[int, Handler] = {
            FuseOpcode.FUSE_WRITE: self._write,
            FuseOpcode.FUSE_READ: self._read,
            FuseOpcode.FUSE_IOCTL: self._ioctl,
            FuseOpcode.FUSE_POLL: self._poll,
            FuseOpcode.FUSE_OPEN: self._open,
            FuseOpcode.FUSE_RELEASE: self._release,
            FuseOpcode.FUSE_INTERRUPT: self._interrupt,
        }

    @property
    def is_open(self) -> bool:
        """Whether somebody has the device open."""
        return bool(self._opens)

    def suspend(self) -> SavedDeviceSession[Saved]:
        """The session as plain values; it is not used any more."""
        return SavedDeviceSession(
            self._next_handle,
            tuple(
                (handle, self._opened[handle], found.suspend())
                for handle, found in self._opens.items()
            ),
            tuple(self._waiting.values()),
            tuple(self._polls.items()),
            first_handle=self._first_handle,
        )

    def resume(self, saved: SavedDeviceSession[Saved]) -> None:
        """Goes on where *saved* was suspended; called once, before anything else."""
        self._next_handle, self._first_handle = saved.next_handle, saved.first_handle
        self._opened = {handle: number for handle, number, _ in saved.opens}
        self._opens = {
            handle: self._files[number].resume(found) for handle, number, found in saved.opens
        }
        self._waiting = {unique_of(memoryview(message)): message for message in saved.waiting}
        self._polls = dict(saved.polls)

    @property
    def at_rest(self) -> bool:
        """Whether no call waits for an answer."""
        return not self._waiting

    def take_over(self, first_handle: int) -> bytes:
        """Goes on for a server that has died and left nothing; called once, before anything else.

        What it had open is open anew when somebody uses it; its handles are all below
        *first_handle*. Who waits for an answer of its, may be interrupted.

        Returns:
            What asks the kernel for the requests that it has not answered; older kernels refuse.
        """
        self._next_handle = self._first_handle = first_handle
        return _OUT.pack(_OUT.size, FUSE_NOTIFY_RESEND, 0)

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
            reply = handler(message, unique)
        except VtpmError as exc:
            return error_reply(unique, faults.errno_of(exc))
        except struct.error:  # the request is shorter than its structure
            return error_reply(unique, errno.EINVAL)
        if reply is None and opcode not in _WITHOUT_REPLY:
            self._waiting[unique] = bytes(message)
        return reply

    def _handler(self, opcode: int, _nodeid: int) -> Handler | None:
        return self._handlers.get(opcode)

    def wake(self) -> Iterator[bytes]:
        """After a change of the device: replies to waiting requests, then poll notifications."""
        bug: Exception | None = None
        for unique, message in list(self._waiting.items()):
            try:
                reply = self._again(memoryview(message), unique)
            except Exception as exc:  # a bug of ours must not keep the others waiting
                bug = exc
                reply = error_reply(unique, errno.EIO)
            if reply is not None:
                del self._waiting[unique]
                yield reply
        while self._polls:
            wakeup = FusePollWakeup(self._polls.popitem()[0]).pack(HOST)
            yield _OUT.pack(_OUT.size + len(wakeup), FUSE_NOTIFY_POLL, 0) + wakeup
        if bug is not None:
            raise bug

    def _again(self, message: memoryview, unique: int) -> bytes | None:
        _, opcode, _, nodeid, *_ = _IN.unpack_from(message)
        handler = self._handler(opcode, nodeid)
        assert handler is not None  # noqa: S101  it was there when the request came
        try:
            return handler(message, unique)
        except VtpmError as exc:
            return error_reply(unique, faults.errno_of(exc))

    def _of(self, handle: int, message: memoryview) -> Open[Saved]:
        found = self._opens.get(handle)
        if found is None:
            if not 0 < handle < self._first_handle:  # the kernel sends none that it was not given
                raise DeviceError(errno.EBADF)
            found = self._new_open(handle, message)
        return found

    def _new_open(self, handle: int, message: memoryview) -> Open[Saved]:
        number = self._file_number(message)
        _, _, _, _, uid, _, pid, *_ = _IN.unpack_from(message)
        found = self._opens[handle] = self._files[number].open(Opener(uid, pid))
        self._opened[handle] = number
        return found

    # -- requests -------------------------------------------------------------------------

    def _write(self, message: memoryview, unique: int) -> bytes:
        handle, _, size, *_ = _TRANSFER.unpack_from(message, _IN.size)
        data = bytes(message[_DATA_AT : _DATA_AT + size])
        self._of(handle, message).write(data)
        return _OUT.pack(_WRITE_REPLY_SIZE, 0, unique) + _WRITTEN.pack(len(data), 0)

    def _read(self, message: memoryview, unique: int) -> bytes | None:
        handle, _, size, _, _, flags, _ = _TRANSFER.unpack_from(message, _IN.size)
        data = self._of(handle, message).read(size, nonblocking=bool(flags & os.O_NONBLOCK))
        return None if data is None else reply_to(unique, data)

    def _ioctl(self, message: memoryview, unique: int) -> bytes | None:
        request = FuseIoctlIn.unpack_untrusted(message[_IN.size :], HOST)
        start = _IN.size + FuseIoctlIn.SIZE
        argument = bytes(message[start : start + request.in_size])
        uid = _IN.unpack_from(message)[4]
        answer = self._of(request.fh, message).ioctl(request.cmd, argument, unique, uid)
        return None if answer is None else reply_to(unique, _IOCTL_DONE + answer)

    def _poll(self, message: memoryview, unique: int) -> bytes:
        request = FusePollIn.unpack_untrusted(message[_IN.size :], HOST)
        events = self._of(request.fh, message).poll()
        if request.flags & FUSE_POLL_SCHEDULE_NOTIFY:
            self._polls[request.kh] = request.fh
        return reply_to(unique, FusePollOut(events).pack(HOST))

    def _open(self, message: memoryview, unique: int) -> bytes:
        handle = self._next_handle
        self._new_open(handle, message)
        self._take_handle()
        return reply_to(unique, FuseOpenOut(handle, _DEVICE_FLAGS).pack(HOST))

    def _file_number(self, _message: memoryview) -> int:
        return 0

    def _take_handle(self) -> int:
        handle, self._next_handle = self._next_handle, self._next_handle + 1
        return handle

    def _release(self, message: memoryview, unique: int) -> bytes:
        handle = handle_of(message)
        if handle not in self._opens and 0 < handle < self._first_handle:
            return reply_to(unique, b"")  # nobody has used it since
        self._of(handle, message).release()
        del self._opens[handle], self._opened[handle]
        self._polls = {kernel: asked for kernel, asked in self._polls.items() if asked != handle}
        return reply_to(unique, b"")

    def _interrupt(self, message: memoryview, _unique: int) -> bytes | None:
        """The interrupted request ends with EINTR; the interruption itself gets no reply."""
        target = FuseInterruptIn.unpack_untrusted(message[_IN.size :], HOST).unique
        if self._waiting.pop(target, None) is None and self._first_handle == 1:
            return None  # it was answered, or else a server that has died had it
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


def handle_of(message: memoryview) -> int:
    """Which open a request belongs to, where its body begins with that. Raises struct.error."""
    return int(struct.unpack_from("=Q", message, _IN.size)[0])


def reply_to(unique: int, body: bytes) -> bytes:
    """The request succeeds with *body*."""
    return _OUT.pack(_OUT.size + len(body), 0, unique) + body
