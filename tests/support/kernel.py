"""The kernel's side of CUSE and FUSE, in memory: it writes requests and checks replies as fs/fuse does.

Sizes and offsets are those of linux/fuse.h, written out: the package's own
structures are under test.
"""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from tests.support.engine import FakeEngine
from tests.support.stores import FailingStore
from vtpm_cuse.proto.device import DeviceSession
from vtpm_cuse.storage.sealed import SealedStore
from vtpm_cuse.vtpm.file import SavedOpen, TpmDeviceFile
from vtpm_cuse.vtpm.ptm import PtmService
from vtpm_cuse.vtpm.turn import Turn
from vtpm_cuse.vtpm.vtpm import Vtpm, VtpmOptions

if TYPE_CHECKING:
    from collections.abc import Callable

OPEN, READ, WRITE, RELEASE = 14, 15, 16, 18
FSYNC, FLUSH, INTERRUPT, DESTROY, IOCTL, POLL = 20, 25, 36, 38, 39, 40
SCHEDULE_NOTIFY: Final = 1
IOC_WRITE, IOC_READ = 1, 2


@dataclass
class Reply:
    """What a system call would see."""

    error: int
    body: bytes


def ioctl_sizes(number: int) -> tuple[int, int]:
    """Bytes the kernel passes in and takes back, in restricted mode."""
    direction, size = number >> 30, number >> 16 & 0x3FFF
    return (size if direction & IOC_WRITE else 0), (size if direction & IOC_READ else 0)


OWNER: Final = 1000
"""The user who serves a `Machine`."""


class FakeKernel:
    """Speaks to a session; `after` is what the frontend does behind each request."""

    def __init__(
        self, session: DeviceSession[Any], after: Callable[[], None] | None = None
    ) -> None:
        self.session = session
        self._after = after
        # One buffer for all requests, as in the frontend: nobody may keep a view of it.
        self._buffer = bytearray(1 << 17)
        self._unique = 0
        self.node = 0
        self.handle = 0
        self.uid = 0
        self._out_sizes: dict[int, int] = {}
        self.replies: dict[int, Reply] = {}
        self.notified: list[int] = []

    # -- requests and replies -------------------------------------------------------------

    def send(self, opcode: int, body: bytes, *, out_size: int = 1 << 17) -> int:
        """One request; returns its unique number."""
        self._unique += 2
        unique = self._unique
        self._out_sizes[unique] = out_size
        self.send_raw(self.message(opcode, unique, body, self.node, self.uid))
        return unique

    def send_raw(self, message: bytes) -> None:
        self._buffer[: len(message)] = message
        try:
            reply = self.session.receive(memoryview(self._buffer)[: len(message)])
        finally:
            self._buffer[: len(message)] = b"\xee" * len(message)
        if reply is not None:
            self.take(reply)
        if self._after is not None:
            self._after()

    @staticmethod
    def message(opcode: int, unique: int, body: bytes, node: int = 0, uid: int = 0) -> bytes:
        size = 40 + len(body)
        header = struct.pack("=IIQQIIIHH", size, opcode, unique, node, uid, 0, 4711, 0, 0)
        return header + body

    def take(self, reply: bytes) -> None:
        """A write to the channel; what the kernel would refuse fails the test."""
        length, error, unique = struct.unpack_from("=IiQ", reply)
        assert length == len(reply), "EINVAL: wrong length"
        body = reply[16:]
        if unique == 0:
            assert (error, len(body)) == (1, 8), "EINVAL: not a FUSE_NOTIFY_POLL"
            self.notified.append(struct.unpack("=Q", body)[0])
            return
        assert unique in self._out_sizes, "ENOENT: no such request, or answered before"
        assert -512 < error <= 0, "EINVAL: error out of range"
        assert not (error and body), "EINVAL: an error has no body"
        assert len(body) <= self._out_sizes.pop(unique), "EIO: more than was asked for"
        self.replies[unique] = Reply(-error, body)

    def result(self, unique: int) -> Reply | None:
        """The reply to a request; None while the client still waits."""
        return self.replies.pop(unique, None)

    def call(self, opcode: int, body: bytes, *, out_size: int = 1 << 17) -> Reply:
        reply = self.result(self.send(opcode, body, out_size=out_size))
        assert reply is not None, "the call waits"
        return reply

    # -- system calls ---------------------------------------------------------------------

    def open(self) -> Reply:
        """The client of all later calls is the one that opened last."""
        reply = self.call(OPEN, struct.pack("=II", 2, 0), out_size=16)
        if not reply.error:
            (self.handle,) = struct.unpack_from("=Q", reply.body)
        return reply

    def release(self) -> Reply:
        return self.call(RELEASE, struct.pack("=QIIQ", self.handle, 2, 0, 0), out_size=0)

    def write(self, data: bytes, *, flags: int = 2) -> Reply:
        reply = self.call(WRITE, self._transfer(len(data), flags) + data, out_size=8)
        if not reply.error:
            assert struct.unpack("=II", reply.body) == (len(data), 0)
        return reply

    def start_read(self, size: int = 4096, *, flags: int = 2) -> int:
        return self.send(READ, self._transfer(size, flags), out_size=size)

    def read(self, size: int = 4096, *, flags: int = 2) -> Reply:
        return self.call(READ, self._transfer(size, flags), out_size=size)

    def start_ioctl(self, number: int, argument: bytes = b"") -> int:
        in_size, out_size = ioctl_sizes(number)
        argument = argument[:in_size].ljust(in_size, b"\0")
        body = (
            struct.pack("=QIIQII", self.handle, 0, number, 0x7FFF0000, in_size, out_size) + argument
        )
        return self.send(IOCTL, body, out_size=16 + out_size)

    def ioctl(self, number: int, argument: bytes = b"") -> Reply:
        """The reply's body is the argument given back."""
        reply = self.result(self.start_ioctl(number, argument))
        assert reply is not None, "the call waits"
        return self.ioctl_reply(reply)

    @staticmethod
    def ioctl_reply(reply: Reply) -> Reply:
        if reply.error:
            return reply
        result, flags, in_iovs, out_iovs = struct.unpack_from("=iIII", reply.body)
        assert (flags, in_iovs, out_iovs) == (0, 0, 0), "EIO: retry in restricted mode"
        return Reply(max(0, -result), reply.body[16:])

    def poll(self, *, kh: int = 0) -> int:
        """Events; with *kh* the kernel wants a notification."""
        flags = SCHEDULE_NOTIFY if kh else 0
        reply = self.call(POLL, struct.pack("=QQII", self.handle, kh, flags, 0xFFFF), out_size=8)
        assert reply.error == 0
        return int(struct.unpack("=II", reply.body)[0])

    def interrupt(self, target: int) -> None:
        self._unique += 2
        self.send_raw(self.message(INTERRUPT, target + 1, struct.pack("=Q", target)))

    def _transfer(self, size: int, flags: int) -> bytes:
        return struct.pack("=QQIIQII", self.handle, 0, size, 0, 0, flags, 0)


class Jobs:
    """Where the device's long jobs go: they run when the test says so."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Callable[[], bytes], Callable[[bytes], None]]] = []

    def submit(self, job: Callable[[], bytes], done: Callable[[bytes], None]) -> None:
        self.waiting.append((job, done))

    def run(self) -> None:
        job, done = self.waiting.pop(0)
        done(job())


class Machine:
    """A whole device in memory: client calls go to `kernel`, long jobs to `jobs`."""

    def __init__(
        self, *, tpm2: bool = True, running: bool = True, options: VtpmOptions | None = None
    ) -> None:
        self.store = FailingStore()
        self.engine = FakeEngine(tpm2=tpm2)
        self.vtpm = Vtpm(self.engine, SealedStore(self.store), options)
        self.ptm = PtmService(self.vtpm)
        self.jobs = Jobs()
        owners = frozenset({0, OWNER})
        self.file = TpmDeviceFile(self.vtpm, self.ptm, Turn(self.jobs.submit), self._wake, owners)
        self.session = self.make_session()
        self.kernel = FakeKernel(self.session, self._after)
        if running:
            self.vtpm.start()
            self.engine.calls.clear()

    def make_session(self) -> DeviceSession[SavedOpen]:
        """For FUSE to override."""
        return DeviceSession(self.file)

    def _after(self) -> None:
        if self.file.pending is not None:
            self.file.run_pending()

    def _wake(self) -> None:
        for message in self.session.wake():
            self.kernel.take(message)

    def opened(self) -> FakeKernel:
        """The kernel, with the device open."""
        assert self.kernel.open().error == 0
        return self.kernel


EINTR, EAGAIN, EBUSY, EINVAL = errno.EINTR, errno.EAGAIN, errno.EBUSY, errno.EINVAL
EIO, E2BIG, ENOSYS = errno.EIO, errno.E2BIG, errno.ENOSYS
