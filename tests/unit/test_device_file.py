"""What one open of the device sees, through the session as the kernel drives it."""

from __future__ import annotations

import os
import select
import struct

import pytest

from tests.support import commands as tpm
from tests.support import ptm
from tests.support.engine import CANCELED, echo
from tests.support.kernel import (
    E2BIG,
    EAGAIN,
    EBUSY,
    EINTR,
    EINVAL,
    FakeKernel,
    Machine,
    ioctl_sizes,
)
from tests.support.ptm import result_of, u32
from vtpm_cuse.errors import StateLocked, StorageError

RANDOM = tpm.get_random(8)
OTHER = tpm.get_random(16)
LONG = tpm.create_primary_rsa()
NONBLOCK = os.O_RDWR | os.O_NONBLOCK
READABLE = select.POLLIN | select.POLLRDNORM
WRITABLE = select.POLLOUT | select.POLLWRNORM


def busy_machine() -> tuple[Machine, FakeKernel]:
    """A device whose long command runs until `jobs.run`."""
    machine = Machine()
    kernel = machine.opened()
    assert kernel.write(LONG).error == 0
    assert len(machine.jobs.waiting) == 1
    return machine, kernel


def cancelling(machine: Machine) -> bool:
    return machine.file.cancelling


# -- open and release ---------------------------------------------------------------------


def test_second_open_is_refused() -> None:
    machine = Machine()
    kernel = machine.opened()
    assert kernel.open().error == EBUSY
    assert kernel.open().error == EBUSY
    assert kernel.write(RANDOM).error == 0  # the first one is not disturbed
    kernel.release()
    assert kernel.open().error == 0


def test_open_reply() -> None:
    reply = Machine().kernel.open()
    _fh, open_flags, padding = struct.unpack("=QII", reply.body)
    assert open_flags == 1 | 4 | 16  # FOPEN_DIRECT_IO, FOPEN_NONSEEKABLE, FOPEN_STREAM
    assert padding == 0


def test_unread_response_survives_release() -> None:
    kernel = Machine().opened()
    kernel.write(RANDOM)
    assert kernel.read(10).body == echo(RANDOM)[:10]
    kernel.release()
    kernel.open()
    assert kernel.read().body == echo(RANDOM)[10:]


def test_close_in_mid_command() -> None:
    machine, kernel = busy_machine()
    assert kernel.release().error == 0
    assert kernel.open().error == 0
    assert kernel.write(RANDOM).error == EBUSY
    machine.jobs.run()
    assert kernel.read().body == echo(LONG)
    assert kernel.write(RANDOM).error == 0
    assert kernel.read().body == echo(RANDOM)


# -- read and write -----------------------------------------------------------------------


def test_command_and_response() -> None:
    machine = Machine()
    kernel = machine.opened()
    kernel.write(RANDOM)
    assert kernel.read().body == echo(RANDOM)
    assert machine.engine.commands == [RANDOM]


def test_nothing_to_read_is_end_of_file() -> None:
    kernel = Machine().opened()
    for flags in (os.O_RDWR, NONBLOCK):
        assert kernel.read(flags=flags).body == b""
    kernel.write(RANDOM)
    kernel.read()
    assert kernel.read().body == b""


@pytest.mark.parametrize("sizes", [[10, 4096], [1] * 40, [4, 6, 1000], [5000]])
def test_partial_reads(sizes: list[int]) -> None:
    kernel = Machine().opened()
    kernel.write(RANDOM)
    parts = [kernel.read(size).body for size in sizes]
    assert b"".join(parts) == echo(RANDOM)
    assert kernel.read().body == b""


def test_next_write_discards_the_response() -> None:
    kernel = Machine().opened()
    kernel.write(RANDOM)
    kernel.read(10)
    kernel.write(OTHER)
    assert kernel.read().body == echo(OTHER)
    assert kernel.read().body == b""


def test_failed_write_changes_nothing() -> None:
    machine = Machine()
    kernel = machine.opened()
    kernel.write(RANDOM)
    assert kernel.write(bytes(4097)).error == E2BIG
    assert kernel.read().body == echo(RANDOM)
    assert machine.engine.commands == [RANDOM]


def test_largest_command() -> None:
    machine = Machine()
    kernel = machine.opened()
    assert kernel.write(bytes(4096)).error == 0
    assert machine.engine.commands == [bytes(4096)]
    assert kernel.write(bytes(65536)).error == E2BIG


@pytest.mark.parametrize("size", [1, 6, 9])
def test_stump_gets_a_response(size: int) -> None:
    machine = Machine()
    kernel = machine.opened()
    assert kernel.write(RANDOM[:size]).error == 0
    assert kernel.read().body.hex() == "80010000000a0000009a"
    assert machine.engine.commands == []


@pytest.mark.parametrize(
    ("tpm2", "answer"), [(True, "80010000000a00000101"), (False, "00c40000000a00000009")]
)
def test_stopped_tpm_answers(tpm2: bool, answer: str) -> None:
    machine = Machine(tpm2=tpm2, running=False)
    kernel = machine.opened()
    for command in (RANDOM, LONG, b"\x80"):
        assert kernel.write(command).error == 0
        assert kernel.read().body.hex() == answer
    assert machine.jobs.waiting == []


def test_command_belongs_to_the_device() -> None:
    """The frontend's read buffer is used again at once."""
    machine, kernel = busy_machine()
    kernel.poll()
    machine.jobs.run()
    assert machine.engine.commands == [LONG]


# -- a long command -----------------------------------------------------------------------


def test_read_waits_for_a_long_command() -> None:
    machine, kernel = busy_machine()
    waiting = kernel.start_read(10)
    assert kernel.result(waiting) is None
    machine.jobs.run()
    reply = kernel.result(waiting)
    assert reply is not None
    assert reply.body == echo(LONG)[:10]
    assert kernel.read().body == echo(LONG)[10:]


def test_two_waiting_reads_share_the_response() -> None:
    machine, kernel = busy_machine()
    first, second = kernel.start_read(10), kernel.start_read(4096)
    machine.jobs.run()
    replies = [kernel.result(unique) for unique in (first, second)]
    assert all(replies)
    assert b"".join(reply.body for reply in replies if reply) == echo(LONG)


def test_nonblocking_read_of_a_long_command() -> None:
    machine, kernel = busy_machine()
    for _ in range(3):
        assert kernel.read(flags=NONBLOCK).error == EAGAIN
    machine.jobs.run()
    assert kernel.read(flags=NONBLOCK).body == echo(LONG)


def test_write_during_a_long_command() -> None:
    machine, kernel = busy_machine()
    assert kernel.write(RANDOM).error == EBUSY
    assert kernel.write(LONG).error == EBUSY
    machine.jobs.run()
    assert machine.engine.commands == [LONG]
    assert kernel.read().body == echo(LONG)


def test_old_response_is_gone_during_a_long_command() -> None:
    machine = Machine()
    kernel = machine.opened()
    kernel.write(RANDOM)
    kernel.write(LONG)
    waiting = kernel.start_read()
    assert kernel.result(waiting) is None
    machine.jobs.run()
    reply = kernel.result(waiting)
    assert reply is not None
    assert reply.body == echo(LONG)


def test_fault_in_a_long_command() -> None:
    machine = Machine()
    machine.engine.script[0x131] = StorageError("x", "disk full")
    kernel = machine.opened()
    kernel.write(LONG)
    machine.jobs.run()
    assert kernel.read().body.hex() == "80010000000a00000101"


# -- INTERRUPT ----------------------------------------------------------------------------


def test_interrupted_read() -> None:
    machine, kernel = busy_machine()
    waiting = kernel.start_read()
    kernel.interrupt(waiting)
    reply = kernel.result(waiting)
    assert reply is not None
    assert reply.error == EINTR
    kernel.interrupt(waiting)  # and once more, too late
    machine.jobs.run()
    assert kernel.result(waiting) is None  # answered once only
    assert kernel.read().body == echo(LONG)  # the response is not lost


def test_interrupted_ioctl_is_not_carried_out() -> None:
    machine, kernel = busy_machine()
    waiting = kernel.start_ioctl(ptm.STOP)
    kernel.interrupt(waiting)
    reply = kernel.result(waiting)
    assert reply is not None
    assert reply.error == EINTR
    machine.jobs.run()
    assert machine.vtpm.running
    assert kernel.read().body == echo(LONG)


def test_interruption_hits_its_request_alone() -> None:
    machine, kernel = busy_machine()
    first, second = kernel.start_read(), kernel.start_ioctl(ptm.GET_TPMESTABLISHED)
    kernel.interrupt(first)
    assert kernel.result(second) is None
    machine.jobs.run()
    reply = kernel.result(second)
    assert reply is not None
    assert result_of(kernel.ioctl_reply(reply)) == 0


def test_late_interruption_is_ignored() -> None:
    kernel = Machine().opened()
    kernel.write(RANDOM)
    unique = kernel.start_read()
    kernel.interrupt(unique)
    kernel.interrupt(12345678)
    reply = kernel.result(unique)
    assert reply is not None
    assert reply.body == echo(RANDOM)


# -- poll ---------------------------------------------------------------------------------


def test_poll_events() -> None:
    machine = Machine()
    kernel = machine.opened()
    assert kernel.poll() == WRITABLE
    kernel.write(RANDOM)
    assert kernel.poll() == WRITABLE | READABLE
    kernel.read(10)
    assert kernel.poll() == WRITABLE | READABLE
    kernel.read()
    assert kernel.poll() == WRITABLE
    kernel.write(LONG)
    assert kernel.poll() == 0
    machine.jobs.run()
    assert kernel.poll() == WRITABLE | READABLE


def test_poll_is_notified_when_a_long_command_ends() -> None:
    machine, kernel = busy_machine()
    assert kernel.poll(kh=7) == 0
    assert kernel.poll(kh=7) == 0
    assert kernel.poll(kh=8) == 0
    assert kernel.notified == []
    machine.jobs.run()
    assert sorted(kernel.notified) == [7, 8]
    kernel.write(RANDOM)
    assert sorted(kernel.notified) == [7, 8]  # a waiter asks anew


def test_poll_is_notified_of_a_short_command() -> None:
    kernel = Machine().opened()
    kernel.poll(kh=7)
    kernel.write(RANDOM)
    assert kernel.notified == [7]


def test_poll_without_a_wish_is_not_notified() -> None:
    machine, kernel = busy_machine()
    kernel.poll()
    machine.jobs.run()
    assert kernel.notified == []


def test_released_poll_is_forgotten() -> None:
    machine, kernel = busy_machine()
    kernel.poll(kh=7)
    kernel.release()
    machine.jobs.run()
    assert kernel.notified == []


# -- ioctls while a command runs ----------------------------------------------------------

AT_ONCE = [
    ptm.GET_CAPABILITY,
    ptm.SET_LOCALITY,
    ptm.CANCEL_TPM_CMD,
    ptm.GET_CONFIG,
    ptm.SET_BUFFERSIZE,
    ptm.GET_INFO,
    ptm.LOCK_STORAGE,
]
LATER = [number for number in ptm.ALL if number not in {*AT_ONCE, ptm.SET_DATAFD}]


@pytest.mark.parametrize("number", AT_ONCE)
def test_answered_while_busy(number: int) -> None:
    _, kernel = busy_machine()
    assert kernel.ioctl(number).error == 0


@pytest.mark.parametrize("number", LATER)
def test_waits_while_busy(number: int) -> None:
    machine, kernel = busy_machine()
    waiting = kernel.start_ioctl(number)
    assert kernel.result(waiting) is None
    assert machine.engine.calls == []
    machine.jobs.run()
    reply = kernel.result(waiting)
    assert reply is not None
    assert reply.error == 0


def test_cancel_reaches_the_running_command() -> None:
    machine, kernel = busy_machine()
    assert result_of(kernel.ioctl(ptm.CANCEL_TPM_CMD)) == 0
    assert "cancel" in machine.engine.calls
    assert cancelling(machine)
    machine.engine.script[0x131] = CANCELED
    machine.jobs.run()
    assert kernel.read().body == CANCELED
    assert not cancelling(machine)


def test_cancel_between_commands() -> None:
    machine = Machine()
    kernel = machine.opened()
    assert result_of(kernel.ioctl(ptm.CANCEL_TPM_CMD)) == 0
    assert not cancelling(machine)
    assert result_of(Machine(tpm2=False).opened().ioctl(ptm.CANCEL_TPM_CMD)) == 9
    assert result_of(Machine(running=False).opened().ioctl(ptm.CANCEL_TPM_CMD)) == 0xA


def test_shutdown_waits_and_then_happens() -> None:
    machine, kernel = busy_machine()
    waiting = kernel.start_ioctl(ptm.SHUTDOWN)
    assert machine.vtpm.running
    machine.jobs.run()
    assert machine.ptm.shutdown_requested
    assert kernel.result(waiting) is not None


# -- ioctls -------------------------------------------------------------------------------


def test_capabilities() -> None:
    for tpm2 in (True, False):
        for running in (True, False):
            kernel = Machine(tpm2=tpm2, running=running).opened()
            assert kernel.ioctl(ptm.GET_CAPABILITY).body == struct.pack("=Q", 0x16FFF)


@pytest.mark.parametrize("number", ptm.ALL)
@pytest.mark.parametrize("running", [True, False])
def test_every_request_gets_its_structure(number: int, running: bool) -> None:
    kernel = Machine(running=running).opened()
    reply = kernel.ioctl(number)
    if number == ptm.SET_DATAFD:
        assert reply.error == EINVAL
        return
    assert reply.error == 0
    assert 4 <= len(reply.body) <= ioctl_sizes(number)[1]


@pytest.mark.parametrize("direction", range(4))
def test_every_other_number_is_refused(direction: int) -> None:
    """All numbers, and around every size that exists."""
    sizes = {0, 1, 3, 4, 5, 7, 8, 9, 12, 16, 17, 3072, 3084, 3088, 4096, 4100, 16383}
    sizes |= {number >> 16 & 0x3FFF for number in ptm.ALL}
    machine = Machine()
    kernel = machine.opened()
    for command in range(256):
        for size in sizes:
            number = direction << 30 | size << 16 | 0x50 << 8 | command
            if number not in ptm.ALL:
                assert kernel.ioctl(number, bytes(size)).error == EINVAL, hex(number)
    for number in (0x5401, 0x5413, 0, 0xFFFFFFFF):  # TCGETS, TIOCGWINSZ
        assert kernel.ioctl(number).error == EINVAL
    assert machine.engine.calls == []


def test_argument_shorter_than_its_structure() -> None:
    """The kernel does not send such, in restricted mode."""
    machine = Machine()
    kernel = machine.opened()
    body = struct.pack("=QIIQII", kernel.handle, 0, ptm.SET_BUFFERSIZE, 0, 2, 16) + b"xx"
    unique = kernel.send(39, body)
    reply = kernel.result(unique)
    assert reply is not None
    assert reply.error == EINVAL


def test_stop_discards_the_response() -> None:
    kernel = Machine().opened()
    kernel.write(RANDOM)
    assert result_of(kernel.ioctl(ptm.STOP)) == 0
    assert kernel.poll() == WRITABLE
    assert kernel.read().body == b""


def test_init_keeps_it() -> None:
    kernel = Machine().opened()
    kernel.write(RANDOM)
    assert result_of(kernel.ioctl(ptm.INIT, u32(0))) == 0
    assert kernel.read().body == echo(RANDOM)


def test_hash_data() -> None:
    machine = Machine()
    kernel = machine.opened()
    assert result_of(kernel.ioctl(ptm.HASH_DATA, u32(4096) + b"h" * 4096)) == 0
    assert bytes(machine.engine.hashed) == b"h" * 4096
    assert result_of(kernel.ioctl(ptm.HASH_DATA, u32(4097) + b"h" * 4096)) == 9
    assert result_of(kernel.ioctl(ptm.HASH_DATA, u32(0))) == 0


def test_locality_goes_with_the_command() -> None:
    machine = Machine()
    kernel = machine.opened()
    assert result_of(kernel.ioctl(ptm.SET_LOCALITY, b"\x03\xff\xff\xff")) == 0
    kernel.write(RANDOM)
    assert machine.engine.localities == [3]


def test_established() -> None:
    machine = Machine()
    machine.engine.is_established = True
    assert machine.opened().ioctl(ptm.GET_TPMESTABLISHED).body == u32(0) + b"\1\0\0\0"


def test_info() -> None:
    machine = Machine()
    machine.engine.text = "x" * 4000
    kernel = machine.opened()
    body = kernel.ioctl(ptm.GET_INFO, struct.pack("=QII", 1, 0, 0)).body
    assert struct.unpack_from("=III", body) == (0, 4001, 3072)
    body = kernel.ioctl(ptm.GET_INFO, struct.pack("=QII", 1, 3072, 0)).body
    assert struct.unpack_from("=III", body) == (0, 4001, 929)
    assert body[12:] == b"x" * 928 + b"\0"
    assert result_of(kernel.ioctl(ptm.GET_INFO, struct.pack("=QII", 1, 4000, 0))) == 3


# -- PTM_LOCK_STORAGE ---------------------------------------------------------------------


def test_lock_storage_once() -> None:
    machine = Machine(running=False)
    kernel = machine.opened()
    assert result_of(kernel.ioctl(ptm.LOCK_STORAGE, u32(0))) == 0
    machine.store.faults["lock"] = StateLocked("x", "taken")
    assert result_of(kernel.ioctl(ptm.LOCK_STORAGE, u32(0))) == 9
    assert machine.jobs.waiting == []


def test_lock_storage_with_retries() -> None:
    machine = Machine(running=False)
    kernel = machine.opened()
    machine.store.faults["lock"] = StateLocked("x", "taken")
    waiting = kernel.start_ioctl(ptm.LOCK_STORAGE, u32(3))
    assert kernel.result(waiting) is None
    before = machine.store.locks
    machine.jobs.run()
    assert machine.store.locks - before == 4
    reply = kernel.result(waiting)
    assert reply is not None
    assert result_of(kernel.ioctl_reply(reply)) == 9
    waiting = kernel.start_ioctl(ptm.LOCK_STORAGE, u32(3))
    machine.store.faults.clear()
    machine.jobs.run()
    reply = kernel.result(waiting)
    assert reply is not None
    assert result_of(kernel.ioctl_reply(reply)) == 0


def test_interrupted_lock_storage() -> None:
    machine = Machine(running=False)
    kernel = machine.opened()
    machine.store.faults["lock"] = StateLocked("x", "taken")
    waiting = kernel.start_ioctl(ptm.LOCK_STORAGE, u32(1))
    kernel.interrupt(waiting)
    reply = kernel.result(waiting)
    assert reply is not None
    assert reply.error == EINTR
    machine.jobs.run()
    assert kernel.write(RANDOM).error == 0
