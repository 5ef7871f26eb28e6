"""When a TPM of the kernel's is there for who waits for it; sysfs and its devices are files here."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Never

import pytest
import trio

from tests.support.processes import in_child
from tests.support.waiting import PATIENCE_SECONDS, wait_until
from vtpm_cuse.acquire.watcher import DeviceWatcher
from vtpm_cuse.containers import nodes
from vtpm_cuse.errors import FrontendError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from vtpm_cuse.containers.nodes import Event, Node


class Machine(nodes.Events):
    """The kernel, its clock and its events: what happens when, and whether it is announced."""

    def __init__(self, folder: Path) -> None:
        self.classes, self.devices = folder / "class", folder / "dev"
        self.classes.mkdir()
        self.devices.mkdir()
        self.now = 0.0
        self._later: list[tuple[float, Callable[[], None], Event | None]] = []

    def in_sysfs(self, name: str, version: str = "2") -> None:
        folder = self.classes / name.rstrip("0123456789") / name
        folder.mkdir(parents=True)
        (folder / "dev").write_text("10:224\n")
        (folder / "tpm_version_major").write_text(f"{version}\n")

    def in_dev(self, name: str) -> None:
        (self.devices / name).touch()

    def at(self, seconds: float, what: Callable[[], None], *, action: str = "") -> None:
        """At that time something happens; with an *action*, who listens hears of it."""
        event = {"ACTION": action, "DEVPATH": "/devices/virtual/tpm/tpm7"} if action else None
        self._later.append((seconds, what, event))

    def whole(self, name: str) -> None:
        """Device node and sysfs, as the kernel makes them before it announces a device."""
        self.in_dev(name)
        self.in_sysfs(name)

    def wait(self, seconds: float) -> list[Event]:
        end = self.now + seconds
        while self._later and self._later[0][0] <= end:
            self.now, what, event = self._later.pop(0)
            what()
            if event is not None:
                return [event]
        self.now = end
        return []

    def wait_for(self, *, tpm2: bool | None = None) -> list[Node]:
        return nodes.wait_for(self, 7, 10, tpm2=tpm2)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    found = Machine(tmp_path)
    monkeypatch.setattr(nodes, "CLASSES", found.classes)
    monkeypatch.setattr(nodes, "DEVICES", found.devices)
    monkeypatch.setattr(nodes, "monotonic", lambda: found.now)
    return found


def test_who_waits_sleeps_until_the_kernel_announces_the_last_of_it(machine: Machine) -> None:
    machine.at(1, lambda: machine.whole("tpm7"), action="add")
    machine.at(2, lambda: machine.whole("tpmrm7"), action="add")
    found = machine.wait_for()
    assert [node.path.name for node in found] == ["tpm7", "tpmrm7"]
    assert machine.now == 2


def test_a_tpm_1_2_has_one_device(machine: Machine) -> None:
    machine.in_dev("tpm7")
    machine.in_sysfs("tpm7", version="1")
    assert [node.path.name for node in machine.wait_for()] == ["tpm7"]
    assert machine.now == 0


def test_a_device_that_was_there_before_is_not_waited_for(machine: Machine) -> None:
    machine.whole("tpm7")
    machine.whole("tpmrm7")
    assert len(machine.wait_for()) == 2
    assert machine.now == 0


def test_a_device_comes_a_moment_after_sysfs_has_it(machine: Machine) -> None:
    machine.in_sysfs("tpm7", version="1")
    machine.at(0.1, lambda: machine.in_dev("tpm7"), action="add")
    machine.wait_for()
    assert machine.now == 0.1


def test_in_a_container_sysfs_will_do(machine: Machine) -> None:
    machine.at(1, lambda: machine.in_sysfs("tpm7", version="1"), action="add")
    machine.wait_for()
    assert 1 < machine.now < 2


def test_a_container_that_hears_nothing_looks_once_more_at_the_end(machine: Machine) -> None:
    machine.at(1, lambda: machine.in_sysfs("tpm7", version="1"))
    assert [node.path.name for node in machine.wait_for()] == ["tpm7"]
    assert 10 <= machine.now < 11


def test_not_at_all(machine: Machine) -> None:
    """As while a slow machine's kernel still tests the TPM: who waits is not kept for ever."""
    with pytest.raises(FrontendError, match="/dev/tpm7 has not come within 10 s; see dmesg"):
        machine.wait_for()
    assert machine.now == 10


def test_a_tpm_that_ends_while_it_is_waited_for(machine: Machine) -> None:
    machine.at(1, lambda: None, action="remove")
    with pytest.raises(FrontendError, match="/dev/tpm7 has gone again: its TPM has ended"):
        machine.wait_for()


def test_events_are_no_longer_heard_once_nobody_waits() -> None:
    ours, theirs = os.pipe()
    events = nodes.Events(until=ours)
    try:
        os.close(theirs)
        with pytest.raises(FrontendError, match="Nobody waits"):
            events.wait(PATIENCE_SECONDS)
    finally:
        events.close()
        os.close(ours)


# -- the process that waits for a server in its sandbox -------------------------------------


def watcher_for(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> tuple[DeviceWatcher, int]:
    """The watcher and its process id; on that machine."""
    fork, pids = os.fork, []

    def noted() -> int:
        pids.append(fork())
        return pids[-1]

    monkeypatch.setattr(os, "fork", noted)
    monkeypatch.setattr(nodes, "Events", lambda until: machine)
    watcher = DeviceWatcher(tpm2=True)
    return watcher, pids[0]


@in_child
def test_a_server_hears_of_its_device_from_a_process_that_ends(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    machine.at(1, lambda: machine.whole("tpm7"), action="add")
    machine.at(2, lambda: machine.whole("tpmrm7"), action="add")
    watcher, pid = watcher_for(machine, monkeypatch)
    trio.run(watcher.shown, 7)
    assert caplog.records == []
    assert os.waitpid(pid, 0) == (pid, 0)


@in_child
def test_a_server_says_that_its_device_has_not_come(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    watcher, _ = watcher_for(machine, monkeypatch)
    with caplog.at_level(logging.WARNING):
        trio.run(watcher.shown, 7)
    assert caplog.messages == [
        "/dev/tpmrm7 may not be there yet: /dev/tpm7 has not come within 10 s; see dmesg"
    ]


@in_child
def test_where_sysfs_cannot_be_seen(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    machine.classes.rmdir()
    watcher, _ = watcher_for(machine, monkeypatch)
    trio.run(watcher.shown, 7)
    assert caplog.records == []


@in_child
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (FrontendError("There are no events"), "There are no events"),
        (ImportError("No module named 'pyroute2'"), "No module named 'pyroute2'"),
        (ZeroDivisionError(), "nobody could look"),
    ],
)
def test_a_watcher_that_has_ended_before_it_is_asked(
    error: Exception,
    reason: str,
    machine: Machine,  # which has a sysfs
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(until: int) -> Never:
        raise error

    monkeypatch.setattr(nodes, "Events", fail)
    watcher = DeviceWatcher(tpm2=True)
    assert os.waitpid(-1, 0)[1] == 0
    with caplog.at_level(logging.WARNING):
        trio.run(watcher.shown, 7)
    assert caplog.messages == [f"/dev/tpmrm7 may not be there yet: {reason}"]


@in_child
def test_a_watcher_ends_with_its_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the kernel's own events, which are none here."""
    watcher = DeviceWatcher(tpm2=True)
    watcher.close()
    wait_until(lambda: os.waitpid(-1, os.WNOHANG)[0] != 0, "its end")
