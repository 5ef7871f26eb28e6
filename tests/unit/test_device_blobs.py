"""State blobs in and out of the device, by ioctls and by read and write."""

from __future__ import annotations

import errno
import select

import pytest

from tests.support import commands as tpm
from tests.support import ptm
from tests.support.engine import echo
from tests.support.kernel import EIO, OWNER, FakeKernel, Machine
from tests.support.ptm import PART, PERMANENT, VOLATILE, get_blob, result_of, set_blob, u32
from vtpm_cuse.errors import StateLocked
from vtpm_cuse.storage.sealed import SealedStore
from vtpm_cuse.vtpm.vtpm import VtpmOptions

RANDOM = tpm.get_random(8)
READABLE = select.POLLIN | select.POLLRDNORM
WRITABLE = select.POLLOUT | select.POLLWRNORM


@pytest.mark.parametrize(("uid", "error"), [(0, 0), (OWNER, 0), (OWNER + 1, errno.EPERM)])
def test_state_is_for_root_and_its_owner_whoever_may_use_the_tpm(uid: int, error: int) -> None:
    machine, kernel, _ = with_blob(100)
    kernel.uid = uid
    assert kernel.ioctl(ptm.GET_STATEBLOB, u32(0, PERMANENT, 0)).error == error
    assert kernel.ioctl(ptm.GET_CONFIG).error == 0
    kernel.write(RANDOM)
    machine.vtpm.stop()
    assert kernel.ioctl(ptm.SET_STATEBLOB, u32(0, PERMANENT, 4) + b"abcd").error == error


EVERYBODYS = {
    *{ptm.GET_CAPABILITY, ptm.GET_TPMESTABLISHED, ptm.CANCEL_TPM_CMD},
    *{ptm.GET_CONFIG, ptm.GET_INFO, ptm.GET_CLIENTS, ptm.FLUSH_CLIENT},
}


@pytest.mark.parametrize("number", set(ptm.ALL) - {ptm.SET_DATAFD})
def test_who_may_use_the_tpm_is_not_its_platform(number: int) -> None:
    kernel = Machine().opened()
    kernel.uid = OWNER + 1
    error = kernel.ioctl(number, bytes(number >> 16 & 0x3FFF)).error
    assert error == (0 if number in EVERYBODYS else errno.EPERM)


# -- state blobs out ----------------------------------------------------------------------


def with_blob(size: int) -> tuple[Machine, FakeKernel, bytes]:
    """A device whose permanent state, as a migration blob, has *size* bytes."""
    machine = Machine()
    payload = bytes(n * 7 & 0xFF for n in range(size - 22))
    SealedStore(machine.store).store("permall", payload)
    _, blob = SealedStore(machine.store).to_migration(payload, decrypted=False)
    assert len(blob) == size
    return machine, machine.opened(), blob


SIZES = [100, PART - 1, PART, PART + 1, 2 * PART - 1, 2 * PART, 2 * PART + 1, 10_000]


@pytest.mark.parametrize("size", SIZES)
def test_get_blob_by_ioctls(size: int) -> None:
    _, kernel, blob = with_blob(size)
    parts: list[bytes] = []
    while len(got := b"".join(parts)) < size:
        result, flags, total, part = get_blob(kernel, PERMANENT, len(got))
        assert (result, flags, total) == (0, 0, size)
        assert len(part) == min(PART, size - len(got))
        parts.append(part)
    assert got == blob
    assert get_blob(kernel, PERMANENT, size) == (0, 0, size, b"")
    assert get_blob(kernel, PERMANENT, 0xFFFFFFFF) == (0, 0, size, b"")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("step", [1000, PART, 1 << 16])
def test_get_blob_by_read(size: int, step: int) -> None:
    _, kernel, blob = with_blob(size)
    got = get_blob(kernel, PERMANENT)[3]
    while part := kernel.read(step).body:
        got += part
    assert got == blob
    assert kernel.poll() == WRITABLE


def test_blob_is_readable_for_poll() -> None:
    _, kernel, _ = with_blob(PART + 5)
    get_blob(kernel, PERMANENT)
    assert kernel.poll() == WRITABLE | READABLE
    kernel.read()
    assert kernel.poll() == WRITABLE


def test_write_ends_the_reading_of_a_blob() -> None:
    machine, kernel, _ = with_blob(PART + 5)
    get_blob(kernel, PERMANENT)
    assert kernel.write(RANDOM).error == EIO
    assert kernel.write(RANDOM).error == 0
    assert kernel.read().body == echo(RANDOM)
    assert machine.engine.commands == [RANDOM]


def test_release_ends_the_reading_of_a_blob() -> None:
    _, kernel, _ = with_blob(PART + 5)
    get_blob(kernel, PERMANENT)
    kernel.release()
    kernel.open()
    assert kernel.read().body == b""


def test_response_waits_behind_a_blob() -> None:
    _, kernel, blob = with_blob(PART + 5)
    kernel.write(RANDOM)
    get_blob(kernel, PERMANENT)
    assert kernel.read(100).body == blob[PART:]
    assert kernel.read(100).body == echo(RANDOM)


def test_offset_0_takes_a_new_snapshot() -> None:
    machine, kernel, blob = with_blob(PART + 5)
    get_blob(kernel, PERMANENT)
    SealedStore(machine.store).store("permall", b"new")
    assert get_blob(kernel, PERMANENT, PART) == (0, 0, PART + 5, blob[PART:])
    assert get_blob(kernel, PERMANENT)[2] == 25
    assert kernel.read().body == b""


def test_two_types_do_not_mix() -> None:
    machine, kernel, blob = with_blob(PART + 5)
    machine.engine.volatile = b"v" * (PART * 2)
    get_blob(kernel, PERMANENT)
    _, _, total, part = get_blob(kernel, VOLATILE, PART)
    assert total == 2 * PART + 22
    assert part == b"v" * PART
    assert get_blob(kernel, PERMANENT, PART)[3] == blob[PART:]


@pytest.mark.parametrize(
    ("kind", "result"), [(ptm.SAVESTATE, 0x800), (0, 9), (4, 9), (0xFFFFFFFF, 9)]
)
def test_absent_blob(kind: int, result: int) -> None:
    _, kernel, _ = with_blob(PART + 5)
    get_blob(kernel, PERMANENT)
    assert get_blob(kernel, kind) == (result, 0, 0, b"")
    assert kernel.read().body == b""  # no mixture with the one before


def test_blob_of_a_stopped_tpm() -> None:
    assert get_blob(Machine(running=False).opened(), PERMANENT) == (0xA, 0, 0, b"")


# -- state blobs in -----------------------------------------------------------------------


def migration_blob(size: int) -> tuple[bytes, bytes]:
    payload = bytes(n * 5 & 0xFF for n in range(size - 22))
    return payload, SealedStore(Machine().store).to_migration(payload, decrypted=False)[1]


@pytest.mark.parametrize("size", SIZES)
def test_set_blob_by_ioctls(size: int) -> None:
    payload, blob = migration_blob(size)
    machine = Machine(running=False)
    kernel = machine.opened()
    for start in range(0, size, PART):
        assert machine.engine.given == {}
        assert set_blob(kernel, PERMANENT, blob[start : start + PART]) == 0
    if size % PART == 0:
        assert machine.engine.given == {}
        assert set_blob(kernel, PERMANENT, b"") == 0
    assert machine.engine.given == {"permall": payload}
    assert kernel.write(RANDOM).error == 0
    assert kernel.read().body  # a TPM's answer: back in command mode


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("step", [1000, PART, 1 << 16])
@pytest.mark.parametrize("tail", [0, 7])
def test_set_blob_by_write(size: int, step: int, tail: int) -> None:
    payload, blob = migration_blob(size)
    machine = Machine(running=False)
    kernel = machine.opened()
    assert set_blob(kernel, VOLATILE, b"") == 0
    body = blob[: len(blob) - tail]
    for start in range(0, len(body), step):
        assert kernel.write(body[start : start + step]).error == 0
    assert machine.engine.given == {}
    assert set_blob(kernel, VOLATILE, blob[len(body) :]) == 0
    assert machine.engine.given == {"volatilestate": payload}


def test_read_ends_the_writing_of_a_blob() -> None:
    machine = Machine(running=False)
    kernel = machine.opened()
    set_blob(kernel, PERMANENT, b"")
    assert kernel.read().error == EIO
    assert kernel.write(RANDOM).error == 0
    assert kernel.read().body.hex() == "80010000000a00000101"


def test_release_ends_the_writing_of_a_blob() -> None:
    machine = Machine(running=False)
    kernel = machine.opened()
    set_blob(kernel, PERMANENT, b"")
    kernel.write(b"half a blob")
    kernel.release()
    kernel.open()
    kernel.write(RANDOM)
    assert kernel.read().body.hex() == "80010000000a00000101"


def test_start_ends_the_writing_of_a_blob() -> None:
    """Else the commands for the TPM that now runs would vanish into the blob."""
    machine = Machine(running=False)
    kernel = machine.opened()
    set_blob(kernel, PERMANENT, b"")
    assert result_of(kernel.ioctl(ptm.INIT, u32(0))) == 0
    assert kernel.write(RANDOM).error == 0
    assert kernel.read().body == echo(RANDOM)


def test_other_type_discards_what_was_collected() -> None:
    payload, blob = migration_blob(100)
    machine = Machine(running=False)
    kernel = machine.opened()
    assert set_blob(kernel, PERMANENT, b"x" * PART) == 0
    assert set_blob(kernel, VOLATILE, blob) == 0
    assert machine.engine.given == {"volatilestate": payload}


@pytest.mark.parametrize("length", [PART + 1, 0xFFFFFFFF])
def test_part_that_is_too_large(length: int) -> None:
    machine = Machine(running=False)
    kernel = machine.opened()
    set_blob(kernel, PERMANENT, b"x" * PART)
    assert set_blob(kernel, PERMANENT, b"x" * PART, length) == 3
    assert kernel.write(RANDOM).error == 0
    assert kernel.read().body


def test_bad_blob_goes_back_to_command_mode() -> None:
    machine = Machine(running=False)
    kernel = machine.opened()
    for blob, result in (
        (b"\0" * 100, 3),
        (b"x", 3),
        (bytes.fromhex("0201000b00040000000b00"), 0x2B),
    ):
        assert set_blob(kernel, PERMANENT, blob) == result
        kernel.write(RANDOM)
        assert kernel.read().body
    assert set_blob(kernel, 9, b"x") == 3
    assert machine.engine.given == {}


def test_blob_without_end() -> None:
    machine = Machine(running=False)
    kernel = machine.opened()
    set_blob(kernel, PERMANENT, b"")
    errors = [kernel.write(bytes(1 << 16)).error for _ in range(8)]
    assert errors == [0] * 8
    assert kernel.write(b"x").error == errno.EFBIG
    kernel.write(RANDOM)  # an error ends the transfer: this is a command again
    assert len(kernel.read().body) == 10
    while set_blob(kernel, VOLATILE, bytes(PART)) == 0:
        pass
    assert machine.engine.given == {}


def test_blob_for_a_running_tpm() -> None:
    machine = Machine()
    kernel = machine.opened()
    assert set_blob(kernel, PERMANENT, b"x") == 0xA
    kernel.write(RANDOM)
    assert kernel.read().body == echo(RANDOM)


def test_blob_without_the_lock() -> None:
    machine = Machine(running=False)
    machine.store.faults["lock"] = StateLocked("x", "taken")
    assert set_blob(machine.opened(), VOLATILE, migration_blob(100)[1]) == 0x1F


def test_blobs_go_from_one_tpm_to_another() -> None:
    source, kernel, _ = with_blob(10_000)
    source.engine.volatile = b"v" * 9000
    target = Machine(running=False)
    to = target.opened()
    for kind in (PERMANENT, VOLATILE):
        blob = get_blob(kernel, kind)[3]
        while part := kernel.read().body:
            blob += part
        for start in range(0, len(blob), PART):
            assert set_blob(to, kind, blob[start : start + PART]) == 0
    assert target.engine.given["permall"] == SealedStore(source.store).load("permall")
    assert target.engine.given["volatilestate"] == b"v" * 9000


SAVESTATE = 3


def holder(size: int, *, release: bool) -> tuple[Machine, FakeKernel]:
    """Has a last blob of about so many bytes, and the lock."""
    machine = Machine(tpm2=False, options=VtpmOptions(release_outgoing=release))
    SealedStore(machine.store).store("savestate", bytes(size))
    return machine, machine.opened()


@pytest.mark.parametrize("size", [100, 2 * PART + 1])
@pytest.mark.parametrize("release", [True, False])
def test_lock_goes_with_the_last_blob_by_ioctls(size: int, release: bool) -> None:
    """If that is wanted, behind its last byte; a command takes it back."""
    machine, kernel = holder(size, release=release)
    got, total = 0, 1
    while got < total:
        assert machine.vtpm.holds_lock
        _, _, total, part = get_blob(kernel, SAVESTATE, got)
        got += len(part)
    assert got > size
    assert machine.vtpm.holds_lock is not release
    kernel.write(RANDOM)
    while machine.jobs.waiting:
        machine.jobs.run()
    assert machine.vtpm.holds_lock


def test_lock_goes_with_the_last_blob_by_read() -> None:
    machine, kernel = holder(2 * PART, release=True)
    get_blob(kernel, SAVESTATE)
    while machine.vtpm.holds_lock:
        part = kernel.read(1000).body
        assert part
    assert kernel.read(1000).body == b""


@pytest.mark.parametrize("release", [True, False])
def test_lock_goes_with_a_last_blob_that_is_not_there(release: bool) -> None:
    """A TPM 2.0 never has one; who asks for it ends a migration all the same."""
    machine = Machine(options=VtpmOptions(release_outgoing=release))
    kernel = machine.opened()
    assert get_blob(kernel, SAVESTATE)[0] == 0x800
    assert machine.vtpm.holds_lock is not release


def test_lock_stays_for_other_blobs() -> None:
    machine, kernel = holder(100, release=True)
    SealedStore(machine.store).store("permall", bytes(100))
    get_blob(kernel, PERMANENT)
    assert machine.vtpm.holds_lock
