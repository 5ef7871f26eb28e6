"""Machines that are saved, restored, moved and reset to a snapshot, with what their TPM holds.

Debian's swtpm 0.7.1 takes part as source and as destination.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

from tests.qemu.facts import check, extend, look
from tests.qemu.machine import OURS, PEER, Machine

if TYPE_CHECKING:
    from pathlib import Path

    from tests.qemu.fleet import Fleet, Kind

KEY: Final = "a key for migrations"
PEERS: Final = pytest.param(
    PEER, id="peer", marks=pytest.mark.skipif(PEER is None, reason="needs Debian's swtpm")
)


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


@pytest.mark.parametrize("program", [pytest.param(OURS, id="ours"), PEERS])
def test_restore(fleet: Fleet, kind: Kind, program: str, tmp_path: Path) -> None:
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


@pytest.mark.parametrize(
    ("sender", "receiver"),
    [
        pytest.param(OURS, OURS, id="ours-ours"),
        pytest.param(OURS, *PEERS.values, id="ours-peer", marks=PEERS.marks),
        pytest.param(*PEERS.values, OURS, id="peer-ours", marks=PEERS.marks),
    ],
)
@pytest.mark.parametrize("keys", [False, True], ids=["plain", "keys"])
def test_migration(
    fleet: Fleet, kind: Kind, sender: str, receiver: str, keys: bool, tmp_path: Path
) -> None:
    socket = tmp_path / "migration"
    options = key_options(tmp_path / "key", KEY) if keys else ()
    with (
        fleet.vm(kind, tmp_path / "source", *options, program=sender) as (source, left),
        fleet.vm(
            kind, tmp_path / "dest", *options, program=receiver, incoming=f"unix:{socket}"
        ) as (destination, right),
    ):
        source.event("RESUME")
        extend(source.shell, 0x33, tpm2=kind.tpm2)
        facts = look(source.shell, fleet.saved(kind).facts.handle, tpm2=kind.tpm2)
        migrate(source, destination, socket)
        source.quit()
        assert left.wait() == 0
        check(destination.shell, facts, tpm2=kind.tpm2)
        destination.quit()
        assert right.wait() == 0


def key_options(path: Path, passphrase: str) -> tuple[str, ...]:
    """A key for the state on disk and for that which is moved."""
    path.write_text(passphrase)
    return ("--key", f"pwdfile={path}", "--migration-key", f"pwdfile={path}")


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


def test_shared_storage(fleet: Fleet, kind: Kind, tmp_path: Path) -> None:
    state, socket = tmp_path / "state", tmp_path / "migration"
    incoming = ("--migration", "incoming,release-lock-outgoing")
    with (
        fleet.vm(kind, tmp_path / "source", *incoming, state=state) as (source, left),
        fleet.vm(kind, tmp_path / "dest", *incoming, state=state, incoming=f"unix:{socket}") as (
            destination,
            right,
        ),
    ):
        source.event("RESUME")
        extend(source.shell, 0x55, tpm2=kind.tpm2)
        facts = look(source.shell, fleet.saved(kind).facts.handle, tpm2=kind.tpm2)
        migrate(source, destination, socket)
        check(destination.shell, facts, tpm2=kind.tpm2)
        # Whoever wakes the source now finds that its state is gone, and the destination untouched.
        source.execute("cont")
        assert left.wait() == 0
        extend(destination.shell, 0x66, tpm2=kind.tpm2)
        destination.quit()
        assert right.wait() == 0
