"""The session of a device file alone: messages in, replies out, whatever the messages are."""

from __future__ import annotations

import errno
import struct

import pytest

from tests.support.kernel import DESTROY, ENOSYS, FLUSH, FSYNC, FakeKernel, Machine
from vtpm_cuse.errors import DeviceError, FrontendError, WireError
from vtpm_cuse.proto.cuse import init_reply
from vtpm_cuse.proto.device import (
    MAX_TRANSFER,
    READ_BUFFER_SIZE,
    DeviceSession,
    Opener,
    error_reply,
    unique_of,
)

INIT_BODY = struct.pack("=IIII", 7, 38, 0, 1)


def init_message(body: bytes = INIT_BODY, opcode: int = 4096) -> memoryview:
    return memoryview(FakeKernel.message(opcode, 2, body))


# -- CUSE_INIT ----------------------------------------------------------------------------


@pytest.mark.parametrize(("major", "minor"), [(0, 0), (245, 7), (511, 1048575)])
def test_init_reply(major: int, minor: int) -> None:
    reply = init_reply(init_message(), "vtpm0", major, minor)
    length, error, unique = struct.unpack_from("=IiQ", reply)
    assert (length, error, unique) == (len(reply), 0, 2)
    fields = struct.unpack_from("=18I", reply, 16)
    assert fields[:4] == (7, 38, 0, 0)
    assert fields[4:6] == (MAX_TRANSFER, MAX_TRANSFER)
    assert fields[6:8] == (major, minor)
    assert not any(fields[8:])
    assert reply[16 + 72 :] == b"DEVNAME=vtpm0\0"


@pytest.mark.parametrize("minor", [11, 38, 99])
def test_minor_is_the_kernels(minor: int) -> None:
    message = init_message(struct.pack("=IIII", 7, minor, 0, 1))
    assert struct.unpack_from("=II", init_reply(message, "x", 0, 0), 16) == (7, minor)


@pytest.mark.parametrize(
    "message",
    [
        memoryview(b""),
        memoryview(b"\0" * 39),
        init_message(b""),
        init_message(INIT_BODY[:15]),
        init_message(opcode=26),
        init_message(struct.pack("=IIII", 8, 0, 0, 0)),
    ],
)
def test_other_messages_are_no_init(message: memoryview) -> None:
    with pytest.raises(FrontendError):
        init_reply(message, "vtpm0", 0, 0)


def test_read_buffer_is_large_enough() -> None:
    """The kernel refuses to hand a request to a smaller one."""
    assert max(8192, 80 + MAX_TRANSFER) <= READ_BUFFER_SIZE


# -- requests -----------------------------------------------------------------------------


@pytest.mark.parametrize("opcode", [0, 1, 3, FSYNC, FLUSH, 26, DESTROY, 4096, 0xFFFFFFFF])
def test_unknown_opcode(opcode: int) -> None:
    machine = Machine()
    kernel = machine.opened()
    reply = kernel.result(kernel.send(opcode, bytes(64)))
    assert reply is not None
    assert reply.error == ENOSYS
    assert machine.engine.calls == []


def test_error_reply() -> None:
    reply = error_reply(0x1122334455667788, errno.EIO)
    assert struct.unpack("=IiQ", reply) == (16, -errno.EIO, 0x1122334455667788)
    assert unique_of(memoryview(FakeKernel.message(14, 99, b""))) == 99


@pytest.mark.parametrize("size", [0, 1, 39])
def test_less_than_a_header(size: int) -> None:
    with pytest.raises(WireError):
        Machine().session.receive(memoryview(bytes(size)))


@pytest.mark.parametrize("opcode", [15, 16, 39, 40, 36])
def test_less_than_a_body(opcode: int) -> None:
    machine = Machine()
    machine.opened()
    for size in (0, 1, 7):
        message = memoryview(FakeKernel.message(opcode, 6, bytes(size)))
        reply = machine.session.receive(message)
        assert reply == error_reply(6, errno.EINVAL)
    assert machine.file.pending is None


def test_write_takes_no_more_than_came() -> None:
    """The header promises 100 bytes, 10 are there."""
    machine = Machine()
    machine.opened()
    body = struct.pack("=QQIIQII", machine.kernel.handle, 0, 100, 0, 0, 2, 0) + bytes(10)
    reply = machine.session.receive(memoryview(FakeKernel.message(16, 6, body)))
    assert reply is not None
    if struct.unpack_from("=IiQ", reply)[1] == 0:
        assert struct.unpack_from("=I", reply, 16) == (10,)


# -- waiting ------------------------------------------------------------------------------


class Gate:
    """A file whose every call waits until the gate is opened; it is every client's open, too."""

    def __init__(self) -> None:
        self.is_open = False
        self.tries = 0
        self.error: DeviceError | None = None

    def _try(self) -> bytes | None:
        self.tries += 1
        if self.error is not None:
            raise self.error
        return b"x" if self.is_open else None

    def open(self, opener: Opener) -> Gate:
        _ = opener
        return self

    def suspend(self) -> int:
        return self.tries

    def resume(self, saved: int) -> Gate:
        self.tries = saved
        return self

    def release(self) -> None:
        pass

    def write(self, data: bytes) -> None:
        raise DeviceError(errno.EBUSY)

    def read(self, size: int, *, nonblocking: bool) -> bytes | None:
        return self._try()

    def ioctl(self, number: int, argument: bytes, call: int, uid: int) -> bytes | None:
        return self._try()

    def poll(self) -> int:
        return 0


def test_waiting_requests_are_tried_again_at_each_change() -> None:
    gate = Gate()
    session = DeviceSession(gate)
    kernel = FakeKernel(session)
    kernel.open()
    first, second = kernel.start_read(), kernel.start_ioctl(0x80045002)
    assert list(session.wake()) == []
    assert gate.tries == 4
    gate.is_open = True
    for message in session.wake():
        kernel.take(message)
    assert kernel.replies[first].body == b"x"
    assert kernel.replies[second].body[16:] == b"x"
    assert list(session.wake()) == []
    assert gate.tries == 6


def test_waiting_request_that_fails() -> None:
    gate = Gate()
    session = DeviceSession(gate)
    kernel = FakeKernel(session)
    kernel.open()
    unique = kernel.start_read()
    gate.error = DeviceError(errno.EIO)
    for message in session.wake():
        kernel.take(message)
    assert kernel.replies[unique].error == errno.EIO
    assert list(session.wake()) == []


def test_interruption_between_two_replies() -> None:
    gate = Gate()
    session = DeviceSession(gate)
    kernel = FakeKernel(session)
    kernel.open()
    uniques = [kernel.start_read() for _ in range(3)]
    kernel.interrupt(uniques[1])
    gate.is_open = True
    for message in session.wake():
        kernel.take(message)
    assert [kernel.replies[unique].error for unique in uniques] == [0, errno.EINTR, 0]


def test_write_of_a_full_transfer() -> None:
    """A buffer for the largest write with its headers is what we offer the kernel."""
    machine = Machine(running=False)
    kernel = machine.opened()
    transfer = struct.pack("=QQIIQII", kernel.handle, 0, MAX_TRANSFER, 0, 0, 2, 0)
    body = transfer + bytes(MAX_TRANSFER)
    assert len(FakeKernel.message(16, 2, body)) <= READ_BUFFER_SIZE
    reply = kernel.result(kernel.send(16, body))
    assert reply is not None
    assert reply.error == errno.E2BIG
