"""Every open has an identity, and a device can be suspended and resumed between two requests."""

from __future__ import annotations

import errno
import random
import struct
from typing import TYPE_CHECKING, Final

import pytest

from tests.support import commands as tpm
from tests.support import ptm
from tests.support.engine import echo
from tests.support.kernel import POLL, READ, RELEASE, WRITE, FakeKernel, Machine, Reply
from tests.support.ptm import u32
from vtpm_cuse.errors import DeviceError
from vtpm_cuse.proto.device import DeviceSession, Opener
from vtpm_cuse.storage.sealed import SealedStore
from vtpm_cuse.vtpm.file import TpmDeviceFile
from vtpm_cuse.vtpm.turn import Turn

if TYPE_CHECKING:
    from collections.abc import Iterator

RANDOM: Final = tpm.get_random(8)
LONG: Final = tpm.create_primary_rsa()


# -- many opens ---------------------------------------------------------------------------


class Note:
    """One open of a `Notes`: it reads back what it wrote, when the notes are not held."""

    def __init__(self, notes: Notes, text: bytes = b"") -> None:
        self._notes = notes
        self.text = text

    def write(self, data: bytes) -> None:
        self.text += data

    def read(self, size: int, *, nonblocking: bool) -> bytes | None:
        return None if self._notes.held and not nonblocking else self.text[:size]

    def ioctl(self, number: int, argument: bytes, call: int, uid: int) -> bytes | None:
        raise DeviceError(errno.ENOTTY)

    def poll(self) -> int:
        return len(self.text)

    def release(self) -> None:
        self._notes.released.append(self.text)

    def suspend(self) -> bytes:
        return self.text


class Notes:
    """A device of which every open is another client."""

    def __init__(self) -> None:
        self.held = False
        self.released: list[bytes] = []
        self.openers: list[Opener] = []

    def open(self, opener: Opener) -> Note:
        self.openers.append(opener)
        return Note(self)

    def resume(self, saved: bytes) -> Note:
        return Note(self, saved)


def clients(kernel: FakeKernel, count: int) -> list[int]:
    """As many opens; their handles."""
    handles = []
    for _ in range(count):
        assert kernel.open().error == 0
        handles.append(kernel.handle)
    return handles


def test_each_open_sees_its_own() -> None:
    notes = Notes()
    kernel = FakeKernel(DeviceSession(notes))
    handles = clients(kernel, 3)
    assert len({*handles, 0}) == 4  # 0 is nobody's
    for number, kernel.handle in enumerate(handles):
        kernel.write(bytes([65 + number]) * (number + 1))
    for number, kernel.handle in enumerate(handles):
        assert kernel.read().body == bytes([65 + number]) * (number + 1)
        assert kernel.poll() == number + 1
    kernel.handle = handles[1]
    kernel.release()
    assert notes.released == [b"BB"]
    kernel.handle = handles[2]
    assert kernel.read().body == b"CCC"


@pytest.mark.parametrize("opcode", [READ, WRITE, POLL, RELEASE])
def test_handle_of_nobody(opcode: int) -> None:
    kernel = FakeKernel(DeviceSession(Notes()))
    (closed,) = clients(kernel, 1)
    kernel.release()
    clients(kernel, 1)
    for handle in (0, closed, kernel.handle + 1, 2**64 - 1):
        reply = kernel.call(opcode, struct.pack("=Q", handle) + bytes(40))
        assert reply.error == errno.EBADF


def test_handles_are_never_used_again() -> None:
    kernel = FakeKernel(DeviceSession(Notes()))
    seen = set()
    for _ in range(5):
        (handle,) = clients(kernel, 1)
        seen.add(handle)
        kernel.release()
    assert len(seen) == 5


def test_a_client_that_leaves_takes_no_others_notification_along() -> None:
    session = DeviceSession(Notes())
    kernel = FakeKernel(session)
    first, second = clients(kernel, 2)
    kernel.handle = first
    kernel.poll(kh=11)
    kernel.handle = second
    kernel.poll(kh=22)
    kernel.release()
    for message in session.wake():
        kernel.take(message)
    assert kernel.notified == [11]


def test_waiting_requests_of_several_clients_outlive_a_suspension() -> None:
    notes = Notes()
    kernel = FakeKernel(session := DeviceSession(notes))
    uniques, handles = [], clients(kernel, 2)
    notes.held = True
    for text, kernel.handle in zip((b"one", b"two"), handles, strict=True):
        kernel.write(text)
        uniques.append(kernel.start_read())
        kernel.poll(kh=kernel.handle)
    saved = session.suspend()
    resumed = DeviceSession(notes)
    resumed.resume(saved)
    assert resumed.suspend() == saved
    assert list(resumed.wake())[2:] == []  # notifications alone: the notes are still held
    notes.held = False
    for message in resumed.wake():
        kernel.take(message)
    assert [kernel.replies[unique].body for unique in uniques] == [b"one", b"two"]


def test_one_that_takes_over_knows_the_clients_of_the_dead_one() -> None:
    notes = Notes()
    kernel = FakeKernel(dead := DeviceSession(notes))
    first, second, idle = clients(kernel, 3)
    kernel.session = session = DeviceSession(notes)
    asks = session.take_over(1 << 32)
    assert asks == struct.pack("=IiQ", 16, 7, 0)  # FUSE_NOTIFY_RESEND
    for text, kernel.handle in zip((b"one", b"two"), (first, second), strict=True):
        kernel.write(text)
        assert kernel.read().body == text
    kernel.handle = idle
    assert kernel.release().error == 0
    assert notes.released == []
    (new,) = clients(kernel, 1)
    assert new == 1 << 32
    for kernel.handle in (first, second, new):
        assert kernel.release().error == 0
    assert notes.released == [b"one", b"two", b""]
    # Of what it has not taken, it cannot say whether anybody has answered it.
    notes.held = True
    clients(kernel, 1)
    orphan = kernel.start_read()
    kernel.session = session = DeviceSession(notes)
    session.take_over(2 << 32)
    kernel.interrupt(orphan)
    assert kernel.replies[orphan].error == errno.EINTR
    saved = session.suspend()
    resumed = DeviceSession(notes)
    resumed.resume(saved)
    assert resumed.suspend() == saved
    assert saved.first_handle == 2 << 32
    assert dead.suspend().first_handle == 1


# -- suspended at every step --------------------------------------------------------------


class Restless(Machine):
    """A device that is suspended and made anew behind every request; nothing else differs."""

    def _after(self) -> None:
        super()._after()
        if not self.file.busy:
            self.renew()

    def renew(self) -> None:
        saved, response = self.session.suspend(), bytes(self.file.response)
        self.file = TpmDeviceFile(self.vtpm, self.ptm, Turn(self.jobs.submit), self._wake)
        self.file.response = memoryview(response)
        self.session = self.make_session()
        self.session.resume(saved)
        self.kernel.session = self.session


def steps(seed: int) -> Iterator[tuple[str, object]]:
    """What clients may do, in an order of chance."""
    chance = random.Random(seed)  # noqa: S311
    kinds = ("open", "release", "write", "read", "ioctl", "blob", "get", "get", "long", "poll")
    for _ in range(60):
        yield chance.choice(kinds), chance.randrange(1 << 30)


def act(machine: Machine, kind: str, number: int) -> list[object]:
    """One step, and everything a client could see of it."""
    kernel, chance = machine.kernel, random.Random(number)  # noqa: S311
    seen: list[object] = []

    def note(reply: Reply | None) -> None:
        seen.append(reply)

    match kind:
        case "open":
            note(kernel.open())
        case "release" if machine.file.is_open:
            note(kernel.release())
        case "write":
            note(kernel.call(WRITE, _written(kernel, tpm.get_random(chance.randrange(1, 60)))))
        case "read":
            size = chance.choice((1, 9, 100, 4096))
            note(kernel.result(kernel.start_read(size)))
        case "ioctl":
            chosen = chance.choice((ptm.INIT, ptm.STOP, ptm.GET_CONFIG, ptm.SET_LOCALITY))
            note(kernel.result(kernel.start_ioctl(chosen, u32(chance.randrange(6)))))
        case "blob":
            part = chance.randbytes(chance.choice((0, 10, 3072)))
            body = u32(0, 1, len(part)) + part.ljust(3072, b"\0")
            note(kernel.result(kernel.start_ioctl(ptm.SET_STATEBLOB, body)))
        case "get":
            body = u32(0, 1, chance.choice((0, 10, 3072, 6144)))
            note(kernel.result(kernel.start_ioctl(ptm.GET_STATEBLOB, body)))
        case "long":
            note(kernel.call(WRITE, _written(kernel, LONG)))
            waits = kernel.start_read()
            while machine.jobs.waiting:
                machine.jobs.run()
            note(kernel.result(waits))
        case "poll" if machine.file.is_open:
            seen.append(kernel.poll(kh=number))
    return [*seen, list(kernel.notified), machine.vtpm.running, machine.engine.localities[-3:]]


def _written(kernel: FakeKernel, data: bytes) -> bytes:
    return struct.pack("=QQIIQII", kernel.handle, 0, len(data), 0, 0, 2, 0) + data


@pytest.mark.parametrize("seed", range(40))
def test_a_suspension_behind_every_request_changes_nothing(seed: int) -> None:
    plain, restless = Machine(), Restless()
    for machine in (plain, restless):  # in three parts, the last one by read()
        SealedStore(machine.store).store("permall", bytes(n * 7 & 0xFF for n in range(8000)))
    done = 0
    for kind, number in steps(seed):
        assert isinstance(number, int)
        assert act(restless, kind, number) == act(plain, kind, number), (done, kind)
        done += 1
    assert done == 60
    assert restless.engine.calls == plain.engine.calls


def test_an_unread_response_outlives_a_suspension() -> None:
    machine = Restless()
    kernel = machine.opened()
    kernel.write(RANDOM)
    assert kernel.read(4).body == echo(RANDOM)[:4]
    assert kernel.read().body == echo(RANDOM)[4:]
