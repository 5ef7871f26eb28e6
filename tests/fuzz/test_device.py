"""A device under any sequence of calls: it answers all, mixes nothing, and stays usable."""

from __future__ import annotations

import errno
import os
import struct

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.support import commands as tpm
from tests.support import ptm
from tests.support.engine import echo
from tests.support.kernel import FakeKernel, Machine, Reply
from tests.support.ptm import PART, u32
from vtpm_cuse.errors import EngineError, StateLocked, StorageError, WireError
from vtpm_cuse.storage.sealed import SealedStore

READ_ONLY = os.O_RDWR | os.O_NONBLOCK
WRITE_ERRORS = {0, errno.EBUSY, errno.E2BIG, errno.EIO, errno.EFBIG}
READ_ERRORS = {0, errno.EAGAIN, errno.EIO}
FAILURE = {bytes.fromhex("80010000000a00000101"), bytes.fromhex("80010000000a0000009a")}


@given(st.lists(st.tuples(st.integers(0, 4200), st.binary(max_size=120)), max_size=15))
def test_any_message(messages: list[tuple[int, bytes]]) -> None:
    """Whatever the kernel might send: an answer or WireError, and a device that still works."""
    machine = Machine()
    session = machine.session
    for opcode, body in messages:
        message = memoryview(bytearray(FakeKernel.message(opcode, 6, body)))
        reply = session.receive(message)
        if reply is not None:
            length, error, _ = struct.unpack_from("=IiQ", reply)
            assert length == len(reply)
            assert -512 < error <= 0
        if machine.file.pending is not None:
            machine.file.run_pending()
        while machine.jobs.waiting:
            machine.jobs.run()
    machine.file.released()
    kernel = machine.opened()
    assert kernel.ioctl(ptm.GET_CONFIG).error == 0


@given(st.binary(max_size=100))
def test_any_bytes(message: bytes) -> None:
    machine = Machine()
    try:
        machine.session.receive(memoryview(bytearray(message)))
    except WireError:
        assert len(message) < 40


@given(st.integers(0, 0xFFFFFFFF), st.binary(max_size=64), st.booleans())
def test_any_ioctl(number: int, argument: bytes, running: bool) -> None:
    kernel = Machine(running=running).opened()
    unique = kernel.send(
        39, struct.pack("=QIIQII", 0, 0, number, 0, len(argument), 1 << 14) + argument
    )
    while kernel.result(unique) is None:
        raise AssertionError("no answer")


class Device(RuleBasedStateMachine):
    """Two clients' worth of system calls in any order, on a fake engine that echoes commands."""

    @initialize(tpm2=st.booleans(), running=st.booleans())
    def begin(self, tpm2: bool, running: bool) -> None:
        self.machine = Machine(tpm2=tpm2, running=running)
        self.kernel = self.machine.kernel
        self.is_open = False
        self.count = 0
        self.reads: list[int] = []
        self.ioctls: list[int] = []
        self.blob_mode = False  # a state blob may be among what read() gives
        self.expected = b""  # what is still to be read of the response
        self.running_command = b""
        SealedStore(self.machine.store).store("permall", bytes(range(256)) * 30)

    # -- helpers --------------------------------------------------------------------------

    def _command(self, code: int, size: int) -> bytes:
        self.count += 1
        return tpm.tpm2(code, struct.pack(">I", self.count) + bytes(size))

    def _took(self, data: bytes) -> None:
        """A command was taken: what must come back."""
        self.blob_mode = False
        if self.machine.jobs.waiting:
            self.running_command = data
        elif not self.machine.vtpm.running:
            self.expected = self._refusal("101", "9")
        elif len(data) < 10:
            self.expected = self._refusal("9a", "19")
        else:
            self.expected = echo(data)

    def _refusal(self, tpm2: str, tpm12: str) -> bytes:
        tag, code = ("8001", tpm2) if self.machine.vtpm.tpm2 else ("00c4", tpm12)
        return bytes.fromhex(f"{tag}0000000a{code:0>8}")

    def _check_read(self, reply: Reply, size: int) -> None:
        assert reply.error in READ_ERRORS
        if reply.error or self.blob_mode:
            return
        assert reply.body == self.expected[:size]
        self.expected = self.expected[size:]

    # -- system calls ---------------------------------------------------------------------

    @rule()
    def open(self) -> None:
        assert self.kernel.open().error == (errno.EBUSY if self.is_open else 0)
        self.is_open = True

    @precondition(lambda self: self.is_open and not self.reads and not self.ioctls)
    @rule()
    def release(self) -> None:
        assert self.kernel.release().error == 0
        self.is_open = False
        self.blob_mode = False

    @precondition(lambda self: self.is_open)
    @rule(code=st.sampled_from([0x17B, 0x17E, 0x131, 0x145, 0x1F]), size=st.integers(0, 60))
    def write(self, code: int, size: int) -> None:
        self._write(self._command(code, size))

    @precondition(lambda self: self.is_open)
    @rule(size=st.sampled_from([1, 9, 4096, 4097, 65536]))
    def write_odd(self, size: int) -> None:
        self._write(bytes(size))

    def _write(self, data: bytes) -> None:
        before = len(self.machine.engine.commands)
        was_busy = bool(self.machine.jobs.waiting)
        client = self.machine.file._open
        collecting = client is not None and client.suspend().incoming is not None
        error = self.kernel.write(data).error
        assert error in WRITE_ERRORS
        if error or collecting:
            assert len(self.machine.engine.commands) == before
            return
        assert not was_busy
        self._took(data)

    @precondition(lambda self: self.is_open and not self.machine.jobs.waiting)
    @rule(size=st.sampled_from([1, 10, 100, 4096]))
    def read(self, size: int) -> None:
        self._check_read(self.kernel.read(size), size)

    @precondition(lambda self: self.is_open and self.machine.jobs.waiting)
    @rule()
    def read_nonblocking(self) -> None:
        assert self.kernel.read(flags=READ_ONLY).error == errno.EAGAIN

    @precondition(lambda self: self.is_open and self.machine.jobs.waiting and len(self.reads) < 3)
    @rule()
    def start_read(self) -> None:
        self.reads.append(self.kernel.start_read(4096))

    @precondition(lambda self: self.reads)
    @rule(which=st.integers(0, 2))
    def interrupt(self, which: int) -> None:
        unique = self.reads.pop(which % len(self.reads))
        self.kernel.interrupt(unique)
        reply = self.kernel.result(unique)
        assert reply is not None
        assert reply.error == errno.EINTR

    @rule(unique=st.integers(0, 1 << 40))
    def interrupt_nobody(self, unique: int) -> None:
        before = dict(self.kernel.replies)
        if unique not in self.reads and unique not in self.ioctls:
            self.kernel.interrupt(unique)
        assert self.kernel.replies == before

    @precondition(lambda self: self.machine.jobs.waiting)
    @rule()
    def finish(self) -> None:
        self.machine.jobs.run()
        if self.running_command:
            self.expected = echo(self.running_command)
            self.running_command = b""
        states = self.ioctls
        self.ioctls = []
        for unique in states:
            reply = self.kernel.result(unique)
            assert reply is not None
        if states:  # they may have started, stopped, or begun a blob
            self.blob_mode = True
            self.reads, gone = [], self.reads
            for unique in gone:
                assert self.kernel.result(unique) is not None
            return
        waiting, self.reads = self.reads, []
        for unique in waiting:
            reply = self.kernel.result(unique)
            assert reply is not None
            self._check_read(reply, 4096)

    # -- ioctls ---------------------------------------------------------------------------

    @precondition(lambda self: self.is_open)
    @rule(
        number=st.sampled_from(
            [number for number in ptm.ALL if number not in {ptm.SET_DATAFD, ptm.SHUTDOWN}]
        ),
        words=st.lists(
            st.sampled_from([0, 1, 2, 3, 4, 5, 100, PART, PART + 1, 1 << 31]), max_size=4
        ),
        rest=st.sampled_from([b"", bytes(PART), b"\x02\x01\x00\x0a"]),
    )
    def ioctl(self, number: int, words: list[int], rest: bytes) -> None:
        argument = u32(*words) + rest
        if number == ptm.LOCK_STORAGE:
            argument = u32(0)
        unique = self.kernel.start_ioctl(number, argument)
        reply = self.kernel.result(unique)
        if reply is None:
            assert self.machine.jobs.waiting
            self.ioctls.append(unique)
            return
        reply = self.kernel.ioctl_reply(reply)
        assert reply.error == 0
        assert len(reply.body) >= 4
        if number == ptm.STOP:
            self.expected = b""
        if number in {ptm.GET_STATEBLOB, ptm.SET_STATEBLOB}:
            self.blob_mode = True

    @precondition(lambda self: self.is_open)
    @rule(kh=st.integers(0, 5))
    def poll(self, kh: int) -> None:
        assert bool(self.kernel.poll(kh=kh)) != bool(self.machine.jobs.waiting)

    # -- the world ------------------------------------------------------------------------

    @rule(
        name=st.sampled_from(["store", "lock", "load", "delete"]),
        fault=st.sampled_from([None, StorageError("x", "full"), StateLocked("x", "taken")]),
    )
    def storage(self, name: str, fault: StorageError | None) -> None:
        self.machine.store.faults.clear()
        if fault is not None:
            self.machine.store.faults[name] = fault

    @rule(fails=st.booleans())
    def starting(self, fails: bool) -> None:
        self.machine.engine.faults.clear()
        if fails:
            self.machine.engine.faults["start"] = EngineError("TPMLIB_MainInit", 0x101)

    @invariant()
    def nothing_is_left_unanswered(self) -> None:
        if hasattr(self, "kernel") and not self.machine.jobs.waiting:
            assert not self.reads
            assert not self.ioctls
            assert not self.kernel.replies

    @invariant()
    def the_state_is_never_damaged(self) -> None:
        if hasattr(self, "machine"):
            assert self.machine.store.blobs["permall"].endswith(bytes(range(256)))

    def teardown(self) -> None:
        if not hasattr(self, "machine"):
            return
        while self.machine.jobs.waiting:
            self.machine.jobs.run()
        self.machine.store.faults.clear()
        self.machine.engine.faults.clear()
        self.machine.file.released()
        kernel = self.machine.opened()
        assert ptm.result_of(kernel.ioctl(ptm.INIT, u32(0))) == 0
        command = self._command(0x17B, 4)
        assert kernel.write(command).error == 0
        assert kernel.read().body == echo(command)


TestDevice = Device.TestCase
TestDevice.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
