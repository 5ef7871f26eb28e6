"""An open of a managed device, where the kernel's own has rules that take time or a busy TPM."""

from __future__ import annotations

import errno
import json
import select

import pytest

from tests.support.commands import create_primary_rsa, get_random
from tests.support.kernel import Machine
from vtpm_cuse.errors import DeviceError
from vtpm_cuse.proto.device import Opener
from vtpm_cuse.resmgr.quota import Limits
from vtpm_cuse.vtpm.managed import ManagedFile, ManagedOpen, ManagedVtpm
from vtpm_cuse.vtpm.turn import Turn
from vtpm_cuse.vtpm.vtpm import VtpmOptions

RANDOM = get_random(8)


class Managed:
    """A managed device, with a clock that stands still and jobs that wait to be run."""

    def __init__(self, options: VtpmOptions | None = None) -> None:
        self.machine = Machine(options=options)
        self.now = 1000.0
        self.changes = 0
        vtpm = self.machine.vtpm
        self.turn = Turn(self.machine.jobs.submit)
        self.clients = ManagedVtpm(vtpm, clock=lambda: self.now)
        self.file = ManagedFile(vtpm, self.clients, self.turn, self._changed)

    def open(self, uid: int = 1000) -> ManagedOpen:
        return self.file.open(Opener(uid, 4711))

    def _changed(self) -> None:
        self.changes += 1

    def asked(self, found: ManagedOpen, command: bytes) -> None:
        found.write(command)
        self.file.run_pending()


def test_an_answer_that_nobody_fetches_is_dropped_after_two_minutes() -> None:
    managed = Managed()
    found = managed.open()
    managed.asked(found, RANDOM)
    managed.now += 119
    assert found.poll() & select.POLLIN
    with pytest.raises(DeviceError) as refusal:
        found.write(RANDOM)
    assert refusal.value.errno == errno.EBUSY
    managed.now += 2
    assert found.poll() & select.POLLOUT
    assert found.read(100, nonblocking=True) == b""
    managed.asked(found, RANDOM)
    assert found.read(100, nonblocking=True)


def test_a_command_waits_for_the_one_that_runs() -> None:
    managed = Managed()
    slow, quick = managed.open(), managed.open()
    managed.asked(slow, create_primary_rsa())
    managed.asked(quick, RANDOM)
    assert slow.read(100, nonblocking=False) is None
    assert quick.read(100, nonblocking=False) is None
    with pytest.raises(DeviceError) as refusal:
        quick.read(100, nonblocking=True)
    assert refusal.value.errno == errno.EAGAIN
    managed.machine.jobs.run()
    assert slow.read(100, nonblocking=True)
    managed.machine.jobs.run()
    assert quick.read(100, nonblocking=True)


def test_who_has_gone_is_closed_behind_the_command() -> None:
    managed = Managed()
    found = managed.open()
    managed.asked(found, create_primary_rsa())
    found.release()
    managed.machine.jobs.run()
    assert not managed.turn.taken
    for _ in range(64):
        managed.open()
    with pytest.raises(DeviceError):
        managed.open()


def test_a_user_who_has_too_many_leaves_room_for_others() -> None:
    managed = Managed()
    for uid in range(4):
        for _ in range(64):
            last = managed.open(uid)
        with pytest.raises(DeviceError) as refusal:
            managed.open(uid)
        assert refusal.value.errno == errno.EMFILE
    with pytest.raises(DeviceError) as refusal:
        managed.open(4)
    assert refusal.value.errno == errno.ENFILE
    last.release()
    managed.open(4)


def test_how_many_there_may_be_and_what_each_may_have() -> None:
    limits = (("objects", 3), ("clients_of_a_user", 2), ("clients", 3))
    managed = Managed(VtpmOptions(limits=limits))
    for _ in range(2):
        managed.open()
    with pytest.raises(DeviceError) as refusal:
        managed.open()
    assert refusal.value.errno == errno.EMFILE
    managed.open(uid=1001)
    with pytest.raises(DeviceError) as refusal:
        managed.open(uid=1002)
    assert refusal.value.errno == errno.ENFILE
    told = json.loads(managed.clients.describe())["limits"]
    assert told == Limits(objects=3, clients_of_a_user=2, clients=3)._asdict()
