"""open, read, write, poll, ioctl and signals on the device: as on the kernel's own /dev/tpm0."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import signal
import struct
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.kernel.harness import (
    LIBC,
    POLL,
    PTM_CANCEL_TPM_CMD,
    PTM_GET_CAPABILITY,
    PTM_GET_CONFIG,
    PTM_GET_INFO,
    PTM_GET_TPMESTABLISHED,
    PTM_INIT,
    PTM_LOCK_STORAGE,
    PTM_SET_BUFFERSIZE,
    PTM_SET_LOCALITY,
    PTM_STOP,
    READ,
    ROOT,
    Background,
    child,
    errno_from,
    exchange,
    opened,
    ptm,
    ptm_result,
    u32,
    wait_blocked,
    wait_child,
    wait_until,
)
from tests.support.commands import (
    NV_INDEX,
    TPM2_STARTUP_CLEAR,
    code_of,
    create_primary_rsa,
    get_random,
    nv_define,
    nv_write,
    pcr_extend,
    pcr_read,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.kernel.harness import Server

TPM_RC_CANCELED = 0x909
TPM_RC_FAILURE = 0x101
PROMPTLY = 10.0
"""Seconds; what is not woken up or interrupted takes a minute."""

KNOWN_STATE = ROOT / "tests/vectors/state/v0.7.1-tpm2-dir-plain/tpm2-00.permall"
_LAB = "LAB_SCRATCH" in os.environ
LONG = create_primary_rsa(bits=3072, unique=(107 if _LAB else 936).to_bytes(4, "big"))
"""A key whose first prime is hard to find on the seeds of KNOWN_STATE: about a second in the slow
lab, and half a second elsewhere.

libtpms looks for a cancellation after each prime. A cancelled command makes no key, so that it
can be used again and again.
"""
LONGER = create_primary_rsa(bits=3072, unique=(160 if _LAB else 929).to_bytes(4, "big"))
"""Nearly three seconds, or one, where a process has to be started or ended meanwhile."""


@pytest.fixture
def fd(server: Server) -> Iterator[int]:
    with opened(server.device) as fd:
        os.read(fd, 8192)  # what an earlier test may have left
        yield fd


def cancel(fd: int) -> None:
    assert ptm_result(fd, PTM_CANCEL_TPM_CMD) == 0


def cancelled(fd: int) -> None:
    """Ends the long command that runs."""
    cancel(fd)
    assert code_of(os.read(fd, 8192)) == TPM_RC_CANCELED


# -- read and write -----------------------------------------------------------------------


def test_response_in_parts(fd: int) -> None:
    os.write(fd, get_random(16))
    header = os.read(fd, 10)
    (size,) = struct.unpack_from(">I", header, 2)
    assert (len(header), size) == (10, 28)
    assert len(os.read(fd, 1)) == 1
    assert len(os.read(fd, 4096)) == 17
    assert os.read(fd, 4096) == b""
    assert os.read(fd, 4096) == b""


def test_nothing_to_read_before_a_command(fd: int) -> None:
    assert os.read(fd, 4096) == b""


def test_unread_response_is_discarded_by_the_next_write(fd: int) -> None:
    os.write(fd, get_random(32))
    os.write(fd, get_random(8))
    assert len(os.read(fd, 4096)) == 20
    assert os.read(fd, 4096) == b""


def test_rest_of_a_response_is_discarded_too(fd: int) -> None:
    os.write(fd, get_random(32))
    os.read(fd, 10)
    assert len(exchange(fd, get_random(8))) == 20


def test_unread_response_outlives_the_open(server: Server) -> None:
    with opened(server.device) as fd:
        os.write(fd, get_random(24))
        assert len(os.read(fd, 10)) == 10
    with opened(server.device) as fd:
        assert len(os.read(fd, 4096)) == 26
        assert os.read(fd, 4096) == b""


def test_empty_write(fd: int) -> None:
    assert os.write(fd, b"") == 0
    assert os.read(fd, 4096) == b""


@pytest.mark.parametrize("size", [1, 2, 9])
def test_short_write_is_a_command(fd: int, size: int) -> None:
    response = exchange(fd, get_random(8)[:size])
    assert (len(response), code_of(response)) == (10, 0x9A)


@pytest.mark.parametrize("size", [10, 11, 4095, 4096])
def test_garbage_gets_a_response(fd: int, size: int) -> None:
    response = exchange(fd, b"\xff" * size)
    assert len(response) == 10
    assert code_of(response) != 0
    assert code_of(exchange(fd, get_random(8))) == 0


@pytest.mark.parametrize("size", [4097, 65536, 65537, 300_000])
def test_oversized_write(fd: int, size: int) -> None:
    command = get_random(8) + bytes(size - 12)
    assert errno_from(lambda: os.write(fd, command)) == errno.E2BIG
    assert os.read(fd, 4096) == b""
    assert code_of(exchange(fd, get_random(8))) == 0


def test_largest_command(fd: int) -> None:
    """4096 bytes reach the TPM whole: it finds its own complaint about them."""
    command = bytearray(get_random(8)) + bytes(4096 - 12)
    struct.pack_into(">I", command, 2, 4096)
    assert os.write(fd, command) == 4096
    assert code_of(os.read(fd, 4096)) == 0x95  # TPM_RC_SIZE: more than the parameters need


def test_vector_write_and_read(fd: int) -> None:
    """The parts of a writev are one command only when the caller sends them as one write."""
    command = get_random(16)
    assert os.writev(fd, [command]) == len(command)
    parts = [bytearray(10), bytearray(100)]
    assert os.readv(fd, parts) == 28
    assert code_of(bytes(parts[0])) == 0


@pytest.mark.parametrize("number", [0x5401, 0x80045063, 0x5000, 0, 0x8004500F])
def test_unknown_ioctl(fd: int, number: int) -> None:
    assert errno_from(lambda: fcntl.ioctl(fd, number, bytearray(64), True)) == errno.EINVAL
    assert code_of(exchange(fd, get_random(8))) == 0


# -- open ---------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [os.O_RDWR, os.O_RDONLY, os.O_WRONLY | os.O_NONBLOCK])
def test_second_open(server: Server, fd: int, flags: int) -> None:
    assert errno_from(lambda: server.open(flags)) == errno.EBUSY
    assert code_of(exchange(fd, get_random(8))) == 0


def test_open_again_and_again(server: Server) -> None:
    for _ in range(50):
        with opened(server.device) as fd:
            assert code_of(exchange(fd, get_random(8))) == 0


def test_duplicates_share_the_open(server: Server) -> None:
    first = server.open()
    second = os.dup(first)
    os.write(first, get_random(16))
    assert len(os.read(second, 10)) == 10
    os.close(first)
    assert errno_from(server.open) == errno.EBUSY
    assert len(os.read(second, 100)) == 18
    os.close(second)
    os.close(server.open())


def test_children_share_the_open(server: Server) -> None:
    fd = server.open()
    os.write(fd, get_random(16))
    gate_read, gate_write = os.pipe()

    def body() -> None:
        os.close(gate_write)
        assert len(os.read(fd, 10)) == 10
        os.read(gate_read, 1)  # until the parent has seen what it wants

    with child(body) as pid:
        os.close(gate_read)
        wait_blocked(pid)
        assert len(os.read(fd, 100)) == 18
        os.close(fd)
        assert errno_from(server.open) == errno.EBUSY
        os.close(gate_write)
        assert wait_child(pid) == 0
    os.close(server.open())


# -- poll ---------------------------------------------------------------------------------


def events(fd: int, seconds: float = 0) -> int:
    poll = select.poll()
    poll.register(fd, select.POLLIN | select.POLLOUT | select.POLLERR)
    return sum(found for _, found in poll.poll(seconds * 1000))


def test_poll_follows_the_response(fd: int) -> None:
    assert events(fd) == select.POLLOUT
    os.write(fd, get_random(16))
    assert events(fd, PROMPTLY) == select.POLLIN | select.POLLOUT
    os.read(fd, 10)
    assert events(fd) == select.POLLIN | select.POLLOUT
    os.read(fd, 18)
    assert events(fd) == select.POLLOUT


def by_poll(fd: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return poll.poll(seconds * 1000) == [(fd, select.POLLIN)]


def by_select(fd: int, seconds: float) -> bool:
    return select.select([fd], [], [], seconds)[0] == [fd]


def by_epoll(fd: int, seconds: float) -> bool:
    with select.epoll() as epoll:
        epoll.register(fd, select.EPOLLIN)
        return epoll.poll(seconds) == [(fd, select.EPOLLIN)]


def by_epoll_edge(fd: int, seconds: float) -> bool:
    with select.epoll() as epoll:
        epoll.register(fd, select.EPOLLIN | select.EPOLLET)
        return epoll.poll(seconds) == [(fd, select.EPOLLIN)]


def until_writable(fd: int, seconds: float) -> bool:
    return select.select([], [fd], [], seconds)[1] == [fd]


@pytest.mark.parametrize(
    "wait", [by_poll, by_select, by_epoll, by_epoll_edge, until_writable], ids=lambda w: w.__name__
)
def test_blocked_waiter_is_woken_up(fd: int, wait: Callable[[int, float], bool]) -> None:
    """Without a notification it would sleep for the whole minute."""
    os.write(fd, LONG)
    assert events(fd) == 0
    started = time.monotonic()
    waiter = Background(lambda: wait(fd, 60))
    wait_blocked(waiter.native_id)
    cancel(fd)
    assert waiter.result() is True
    assert time.monotonic() - started < 30
    assert code_of(os.read(fd, 4096)) == TPM_RC_CANCELED


def test_poll_times_out(fd: int) -> None:
    assert not by_poll(fd, 0.05)
    os.write(fd, LONG)
    assert not by_poll(fd, 0.05)
    cancelled(fd)


# -- long commands ------------------------------------------------------------------------


def test_a_long_command_is_long(fd: int) -> None:
    """What the other tests here rest upon."""
    os.write(fd, LONG)
    assert not by_poll(fd, 0.02)
    cancelled(fd)


def test_read_waits_for_a_long_command(fd: int) -> None:
    assert code_of(exchange(fd, create_primary_rsa(unique=b"wait"))) == 0
    assert code_of(exchange(fd, bytes.fromhex("80010000000e0000016580000000"))) == 0  # flush it


def test_nonblocking_read_and_write(server: Server) -> None:
    with opened(server.device, os.O_RDWR | os.O_NONBLOCK) as fd:
        os.read(fd, 8192)
        os.write(fd, LONG)
        assert errno_from(lambda: os.read(fd, 4096)) == errno.EAGAIN
        assert errno_from(lambda: os.write(fd, get_random(8))) == errno.EBUSY
        cancel(fd)
        assert by_poll(fd, PROMPTLY)
        assert code_of(os.read(fd, 4096)) == TPM_RC_CANCELED
        assert os.read(fd, 4096) == b""


def test_write_during_a_long_command(fd: int) -> None:
    os.write(fd, LONG)
    assert errno_from(lambda: os.write(fd, get_random(8))) == errno.EBUSY
    cancelled(fd)


@pytest.mark.parametrize("attempt", range(10))
def test_cancel_right_after_the_write(fd: int, attempt: int) -> None:
    """libtpms forgets a cancellation that comes before it has begun; we must not."""
    os.write(fd, LONG)
    for _ in range(attempt * 100):  # a little later each time, without giving the processor away
        os.getppid()
    started = time.monotonic()
    cancelled(fd)
    assert time.monotonic() - started < PROMPTLY
    assert code_of(exchange(fd, get_random(8))) == 0


def test_cancel_by_a_thread_that_reads_not(server: Server, fd: int) -> None:
    os.write(fd, LONG)
    reader = Background(lambda: os.read(fd, 4096))
    wait_until(lambda: server.waiting() > 0, "the read waits")
    other = os.dup(fd)
    cancel(other)
    response = reader.result(PROMPTLY)
    assert isinstance(response, bytes)
    assert code_of(response) == TPM_RC_CANCELED
    os.close(other)


def test_cancel_by_another_process(server: Server, fd: int) -> None:
    os.write(fd, LONGER)

    def body() -> None:
        wait_until(lambda: server.waiting() > 0, "the read waits")
        cancel(fd)

    with child(body) as pid:
        assert code_of(os.read(fd, 4096)) == TPM_RC_CANCELED
        assert wait_child(pid) == 0


def test_cancel_without_a_command(fd: int) -> None:
    cancel(fd)
    assert code_of(exchange(fd, get_random(8))) == 0
    assert code_of(exchange(fd, create_primary_rsa(unique=b"not cancelled"))) == 0
    assert code_of(exchange(fd, bytes.fromhex("80010000000e0000016580000000"))) == 0


def test_ioctls_during_a_long_command(fd: int) -> None:
    os.write(fd, LONGER)
    started = time.monotonic()
    assert struct.unpack("=Q", ptm(fd, PTM_GET_CAPABILITY)) == (0x16FFF,)
    assert ptm_result(fd, PTM_SET_LOCALITY, bytes([3])) == 0
    assert ptm_result(fd, PTM_SET_LOCALITY, bytes([5])) == 0x3D
    assert ptm_result(fd, PTM_SET_LOCALITY, bytes([0])) == 0
    assert ptm_result(fd, PTM_GET_CONFIG) == 0
    assert ptm_result(fd, PTM_SET_BUFFERSIZE, u32(0)) == 0
    assert ptm_result(fd, PTM_GET_INFO, struct.pack("=QII", 1, 0, 0)) == 0
    assert ptm_result(fd, PTM_LOCK_STORAGE, u32(0)) == 0
    assert events(fd) == 0
    assert time.monotonic() - started < PROMPTLY
    cancelled(fd)


@pytest.mark.parametrize("number", [PTM_GET_TPMESTABLISHED, PTM_INIT, PTM_STOP])
def test_ioctls_that_wait_for_the_command(server: Server, number: int) -> None:
    with opened(server.device) as fd:
        os.write(fd, LONG)
        waiter = Background(lambda: ptm_result(fd, number))
        wait_until(lambda: server.waiting() > 0, "the ioctl waits")
        assert ptm_result(fd, PTM_GET_CONFIG) == 0
        assert waiter.running
        cancel(fd)
        assert waiter.result(PROMPTLY) == 0
        ptm_result(fd, PTM_INIT)
        os.read(fd, 4096)
        assert code_of(exchange(fd, TPM2_STARTUP_CLEAR)) == 0


def test_second_reader_waits_too(server: Server, fd: int) -> None:
    """Both get an answer: one the response, the other the end of it."""
    os.write(fd, LONG)
    readers = [Background(lambda: os.read(fd, 4096)) for _ in range(2)]
    wait_until(lambda: server.waiting() >= 2, "both reads wait")
    cancel(fd)
    sizes = sorted(len(answer) for answer in (_bytes(r.result(PROMPTLY)) for r in readers))
    assert sizes == [0, 10]


def _bytes(value: object) -> bytes:
    assert isinstance(value, bytes)
    return value


# -- closing in mid-command ---------------------------------------------------------------


def test_close_during_a_long_command(server: Server) -> None:
    with opened(server.device) as fd:
        os.write(fd, LONG)
    with opened(server.device) as fd:
        assert events(fd) == 0
        assert errno_from(lambda: os.write(fd, get_random(8))) == errno.EBUSY
        cancelled(fd)
        assert code_of(exchange(fd, get_random(8))) == 0


# -- signals ------------------------------------------------------------------------------


@pytest.mark.parametrize("restart", [False, True])
def test_signal_interrupts_a_waiting_read(server: Server, fd: int, restart: bool) -> None:
    """EINTR at the handler's end, with SA_RESTART as well; the response is not lost."""
    seen = []
    before = signal.signal(signal.SIGUSR1, lambda number, _frame: seen.append(number))
    signal.siginterrupt(signal.SIGUSR1, not restart)
    try:
        os.write(fd, LONGER)

        def interrupt() -> None:
            wait_until(lambda: server.waiting() > 0, "the read waits")
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

        sender = Background(interrupt)
        started = time.monotonic()
        assert _read_once(fd) == -errno.EINTR
        assert time.monotonic() - started < PROMPTLY
        sender.result()
        assert seen == [signal.SIGUSR1]
        assert events(fd) == 0  # the command runs on
        cancelled(fd)
    finally:
        signal.signal(signal.SIGUSR1, before)


def _read_once(fd: int) -> int:
    """read(2) without Python's own restart; minus errno."""
    buffer = ctypes.create_string_buffer(4096)
    size = int(LIBC.read(fd, buffer, 4096))
    return -ctypes.get_errno() if size < 0 else size


def test_signal_interrupts_a_waiting_ioctl(server: Server, fd: int) -> None:
    before = signal.signal(signal.SIGUSR1, _raise_interrupted)
    try:
        os.write(fd, LONGER)

        def interrupt() -> None:
            wait_until(lambda: server.waiting() > 0, "the ioctl waits")
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

        sender = Background(interrupt)
        with pytest.raises((Interrupted, InterruptedError)):
            ptm_result(fd, PTM_GET_TPMESTABLISHED)
        sender.result()
        cancelled(fd)
    finally:
        signal.signal(signal.SIGUSR1, before)


class Interrupted(Exception):
    """The handler's mark."""


def _raise_interrupted(_number: int, _frame: object) -> None:
    raise Interrupted


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_client_ends_at_once(server: Server, number: signal.Signals) -> None:
    """In read(2), in mid-command: no client is ever unkillable, and the next one is served."""

    def body() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        fd = server.open()
        os.write(fd, LONGER)
        os.read(fd, 4096)

    with child(body) as pid:
        wait_blocked(pid, READ)
        os.kill(pid, number)
        assert wait_child(pid, PROMPTLY) == -number
    with opened(server.device) as fd:
        assert events(fd) == 0
        cancelled(fd)


def test_killed_waiter_in_poll(server: Server) -> None:
    def body() -> None:
        fd = server.open()
        os.write(fd, LONGER)
        by_poll(fd, 60)

    with child(body) as pid:
        wait_blocked(pid, POLL)
        os.kill(pid, signal.SIGKILL)
        assert wait_child(pid, PROMPTLY) == -signal.SIGKILL
    with opened(server.device) as fd:
        cancelled(fd)


# -- a stopped TPM ------------------------------------------------------------------------


def test_stopped_tpm_answers(server: Server) -> None:
    with opened(server.device) as fd:
        os.write(fd, get_random(8))
        assert ptm_result(fd, PTM_STOP) == 0
        assert os.read(fd, 4096) == b""  # the stop has discarded it
        response = exchange(fd, get_random(8))
        assert response.hex() == "80010000000a00000101"
        assert ptm_result(fd, PTM_INIT) == 0
        assert code_of(exchange(fd, get_random(8))) == 0x100
        assert code_of(exchange(fd, TPM2_STARTUP_CLEAR)) == 0


def test_locality_outlives_close_and_init(server: Server) -> None:
    with opened(server.device) as fd:
        assert ptm_result(fd, PTM_SET_LOCALITY, bytes([2])) == 0
    with opened(server.device) as fd:
        assert ptm_result(fd, PTM_INIT) == 0
        assert code_of(exchange(fd, TPM2_STARTUP_CLEAR)) == 0x907
        assert ptm_result(fd, PTM_SET_LOCALITY, bytes([0])) == 0
        assert code_of(exchange(fd, TPM2_STARTUP_CLEAR)) == 0


# -- for days -----------------------------------------------------------------------------


def test_thousands_of_commands_leave_nothing_behind(server: Server) -> None:
    def use(rounds: int) -> None:
        for number in range(rounds):
            with opened(server.device) as fd:
                assert code_of(exchange(fd, pcr_extend(16, bytes(32)))) == 0
                for _ in range(10):
                    assert code_of(exchange(fd, get_random(32))) == 0
                    assert code_of(exchange(fd, pcr_read(16))) == 0
                assert events(fd) == select.POLLOUT
                if number % 10 == 0:
                    assert code_of(exchange(fd, nv_write(NV_INDEX, bytes(16)))) == 0
                    ptm(fd, PTM_GET_INFO, struct.pack("=QII", 0x7F, 0, 0))
                assert errno_from(lambda: fcntl.ioctl(fd, 0x5401, bytearray(64))) == errno.EINVAL
                assert errno_from(lambda: os.write(fd, bytes(5000))) == errno.E2BIG

    with opened(server.device) as fd:
        assert code_of(exchange(fd, nv_define(NV_INDEX, 16))) == 0
    use(20)
    descriptors, resident, threads = footprint(server.pid)
    use(100)
    assert footprint(server.pid)[0] == descriptors
    assert footprint(server.pid)[2] == threads
    assert footprint(server.pid)[1] - resident <= 300
    wait_until(lambda: server.waiting() == 0, "the last close is done")


def footprint(pid: int) -> tuple[int, int, int]:
    """Open descriptors, resident memory in KiB, threads."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = dict(line.split(":", 1) for line in status.splitlines())
    resident, threads = int(found["VmRSS"].split()[0]), int(found["Threads"])
    return len(os.listdir(f"/proc/{pid}/fd")), resident, threads
