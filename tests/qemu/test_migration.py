"""Machines that are saved, restored, moved and reset to a snapshot, with what their TPM holds.

The C suite's swtpm takes part as source and as destination: the one of this Debian, and the one
in the folder that kernel-helpers/unstable makes.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final

import pytest

from tests.qemu.facts import Facts, check, extend, forget, look
from tests.qemu.fleet import CRB2, SNAPSHOT, TIS1
from tests.qemu.guest import GuestError
from tests.qemu.machine import NEW_PEER, OURS, PEER, Machine, Program
from tests.support import commands

if TYPE_CHECKING:
    from pathlib import Path

    from _pytest.mark.structures import ParameterSet

    from tests.qemu.fleet import Fleet, Kind

KEY: Final = "a key for migrations"
PAIRS: Final = ((OURS, OURS), (OURS, PEER), (PEER, OURS), (OURS, NEW_PEER), (NEW_PEER, OURS))
some_kinds: Final = pytest.mark.parametrize("kind", [CRB2, TIS1], ids=str)


def programs(*choices: tuple[Program, ...]) -> list[ParameterSet]:
    """Parameters of a test; it is skipped where a program is not installed."""
    return [
        pytest.param(
            *choice,
            id="-".join(map(str, choice)),
            marks=[
                pytest.mark.skipif(not program.installed, reason=f"needs swtpm: {program}")
                for program in choice
            ],
        )
        for choice in choices
    ]


def migrate(source: Machine, destination: Machine, socket: Path) -> None:
    source.start_migration(f"unix:{socket}")
    source.migrated()
    destination.event("RESUME")


# -- save and restore ---------------------------------------------------------------------


def test_source_goes_on_after_saving(fleet: Fleet, kind: Kind) -> None:
    facts = fleet.saved(kind).facts
    shell = fleet.booted(kind).machine.shell
    assert look(shell, facts.handle, tpm2=kind.tpm2).public == facts.public
    extend(shell, 0x22, tpm2=kind.tpm2)


@pytest.mark.parametrize("program", programs((OURS,), (PEER,), (NEW_PEER,)))
def test_restore(fleet: Fleet, kind: Kind, program: Program, tmp_path: Path) -> None:
    with fleet.vm(kind, tmp_path / "vm", program=program) as (machine, emulator):
        machine.event("RESUME")
        check(machine.shell, fleet.saved(kind).facts, tpm2=kind.tpm2)
        machine.quit()
        assert emulator.wait() == 0


def test_restored_state_is_on_disk(fleet: Fleet, kind: Kind, tmp_path: Path) -> None:
    """The permanent state is written at once, so that a crash right after does not lose the TPM."""
    with fleet.vm(kind, tmp_path / "vm") as (machine, emulator):
        machine.event("RESUME")
        names = {path.name for path in emulator.state.iterdir()}
    assert f"tpm{'2' if kind.tpm2 else ''}-00.permall" in names
    assert not [name for name in names if name.endswith(".volatilestate")]


# -- migration ----------------------------------------------------------------------------


@some_kinds
@pytest.mark.parametrize(("sender", "receiver"), programs(*PAIRS))
def test_migration(
    fleet: Fleet, kind: Kind, sender: Program, receiver: Program, tmp_path: Path
) -> None:
    move(fleet, kind, sender, receiver, tmp_path)


@pytest.mark.parametrize(("sender", "receiver"), programs(*PAIRS))
def test_migration_with_keys(
    fleet: Fleet, sender: Program, receiver: Program, tmp_path: Path
) -> None:
    move(fleet, CRB2, sender, receiver, tmp_path, *key_options(tmp_path / "key", KEY))


def move(
    fleet: Fleet, kind: Kind, sender: Program, receiver: Program, folder: Path, *options: str
) -> None:
    """From one host to another that shares no storage with it."""
    with (
        fleet.vm(kind, folder / "from", *options, program=sender) as (source, left),
        fleet.vm(
            kind, folder / "to", *options, program=receiver, incoming=f"unix:{folder}/socket"
        ) as (destination, right),
    ):
        facts = change(fleet, kind, source)
        migrate(source, destination, folder / "socket")
        source.quit()
        assert left.wait() == 0
        check(destination.shell, facts, tpm2=kind.tpm2)
        destination.quit()
        assert right.wait() == 0


def change(fleet: Fleet, kind: Kind, machine: Machine) -> Facts:
    """Something that only this machine's TPM knows, once it was restored."""
    machine.event("RESUME")
    extend(machine.shell, 0x33, tpm2=kind.tpm2)
    return look(machine.shell, fleet.saved(kind).facts.handle, tpm2=kind.tpm2)


def key_options(path: Path, passphrase: str) -> tuple[str, ...]:
    """A key for the state on disk and for that which is moved."""
    path.write_text(passphrase)
    return ("--key", f"pwdfile={path}", "--migration-key", f"pwdfile={path}")


@some_kinds
@pytest.mark.parametrize("receiver", ["another key", "no key"])
def test_wrong_migration_key(fleet: Fleet, kind: Kind, receiver: str, tmp_path: Path) -> None:
    saved, tpm2 = fleet.saved(kind), kind.tpm2
    first, second = tmp_path / "first", tmp_path / "second"
    good = key_options(tmp_path / "key", KEY)
    bad = key_options(tmp_path / "other", "another key") if receiver == "another key" else ()
    with fleet.vm(kind, tmp_path / "source", *good) as (source, left):
        source.event("RESUME")
        with fleet.vm(kind, tmp_path / "bad", *bad, incoming=f"unix:{first}") as (refusing, right):
            source.start_migration(f"unix:{first}")
            assert refusing.process.wait(30) == 1
            assert "load of migration failed" in refusing.log
            assert right.wait() == 0
            assert "State blob refused" in right.log.read_text()
            assert not list(right.state.glob("*permall"))
        # The source may know of it or not: it sent all it had.
        if source.migration_status() != "failed":
            source.migrated()
            source.execute("cont")
        assert look(source.shell, saved.facts.handle, tpm2=tpm2) == saved.facts
        extend(source.shell, 0x44, tpm2=tpm2)
        facts = look(source.shell, saved.facts.handle, tpm2=tpm2)
        with fleet.vm(kind, tmp_path / "good", *good, incoming=f"unix:{second}") as (taking, _):
            migrate(source, taking, second)
            source.quit()
            assert left.wait() == 0
            check(taking.shell, facts, tpm2=tpm2)


# -- migration with one state directory ---------------------------------------------------


INCOMING: Final = ("--migration", "incoming,release-lock-outgoing")
SHARING_PAIRS: Final = ((OURS, OURS), (OURS, NEW_PEER), (NEW_PEER, OURS))


@some_kinds
@pytest.mark.parametrize(("sender", "receiver"), programs(*SHARING_PAIRS))
def test_shared_storage(
    fleet: Fleet, kind: Kind, sender: Program, receiver: Program, tmp_path: Path
) -> None:
    state, socket = tmp_path / "state", tmp_path / "socket"
    with (
        fleet.vm(kind, tmp_path / "from", *INCOMING, program=sender, state=state) as (source, left),
        fleet.vm(
            kind,
            tmp_path / "to",
            *INCOMING,
            program=receiver,
            state=state,
            incoming=f"unix:{socket}",
        ) as (destination, right),
    ):
        facts = change(fleet, kind, source)
        migrate(source, destination, socket)
        check(destination.shell, facts, tpm2=kind.tpm2)
        source.quit()
        assert left.wait() == 0
        extend(destination.shell, 0x66, tpm2=kind.tpm2)
        destination.quit()
        assert right.wait() == 0


@some_kinds
def test_source_that_wakes_up_without_its_state(fleet: Fleet, kind: Kind, tmp_path: Path) -> None:
    """It is in use by the destination: the source's TPM ends, without a word."""
    state, socket = tmp_path / "state", tmp_path / "socket"
    with (
        fleet.vm(kind, tmp_path / "from", *INCOMING, state=state) as (source, left),
        fleet.vm(kind, tmp_path / "to", *INCOMING, state=state, incoming=f"unix:{socket}") as (
            destination,
            _,
        ),
    ):
        facts = change(fleet, kind, source)
        migrate(source, destination, socket)
        source.execute("cont")
        # The guest's driver gets an error from QEMU, and may hand it on, or give up.
        with contextlib.suppress(GuestError):
            (answer,) = source.shell.tpm(commands.get_random(8))
            assert commands.code_of(answer) != 0
        assert left.wait() == 1, "nobody may take it for a success"
        check(destination.shell, facts, tpm2=kind.tpm2)


def test_fall_back_on_the_source(fleet: Fleet, kind: Kind, tmp_path: Path) -> None:
    """The destination goes without having run: the source takes the state back."""
    state, socket = tmp_path / "state", tmp_path / "socket"
    with fleet.vm(kind, tmp_path / "from", *INCOMING, state=state) as (source, _):
        facts = change(fleet, kind, source)
        with fleet.vm(kind, tmp_path / "to", *INCOMING, state=state, incoming=f"unix:{socket}") as (
            destination,
            right,
        ):
            migrate(source, destination, socket)
            destination.quit()
            assert right.wait() == 0
        source.execute("cont")
        check(source.shell, facts, tpm2=kind.tpm2)


# -- snapshots ----------------------------------------------------------------------------


def add_disk(machine: Machine, path: Path) -> None:
    """Makes an image that can hold snapshots, and gives it to the machine."""
    machine.job("blockdev-create", options={"driver": "file", "filename": str(path), "size": 0})
    machine.execute(
        "blockdev-add", **{"driver": "file", "node-name": "file", "filename": str(path)}
    )
    machine.job("blockdev-create", options={"driver": "qcow2", "file": "file", "size": 1 << 20})
    machine.execute("blockdev-add", **{"driver": "qcow2", "node-name": "disk", "file": "file"})


@some_kinds
@pytest.mark.parametrize("program", programs((OURS,), (PEER,), (NEW_PEER,)))
def test_snapshot(fleet: Fleet, kind: Kind, program: Program, tmp_path: Path) -> None:
    """Back to it in the same machine, and in another, with our program or the C suite's."""
    snapshot = {"tag": SNAPSHOT, "vmstate": "disk", "devices": ["disk"]}
    disk, tpm2 = tmp_path / "disk", kind.tpm2
    with fleet.vm(kind, tmp_path / "first") as (machine, _):
        facts = change(fleet, kind, machine)
        add_disk(machine, disk)
        machine.job("snapshot-save", **snapshot)
        assert look(machine.shell, facts.handle, tpm2=tpm2) == facts
        extend(machine.shell, 0x77, tpm2=tpm2)
        forget(machine.shell, facts, tpm2=tpm2)
        machine.job("snapshot-load", **snapshot)
        check(machine.shell, facts, tpm2=tpm2)
        machine.quit()
    with fleet.vm(kind, tmp_path / "second", program=program, disk=disk) as (machine, emulator):
        check(machine.shell, facts, tpm2=tpm2)
        machine.quit()
        assert emulator.wait() == 0
