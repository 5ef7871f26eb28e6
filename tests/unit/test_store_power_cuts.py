"""The power goes at every step of every operation: the old or the new state loads, whole.

Both stores run on `tests.support.disk.Disk`, which enumerates what a disk may hold then: writes
lost, torn at any sector, out of order, names before their contents. The same after a process died
and another one went on, after a failed flush, and on a full disk.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from tests.support.disk import Disk, Inode, PowerCut
from vtpm_cuse import files
from vtpm_cuse.errors import StateMissing, StorageError
from vtpm_cuse.storage import directory, linear
from vtpm_cuse.storage.base import BLOB_NAMES
from vtpm_cuse.storage.directory import DirectoryStore
from vtpm_cuse.storage.linear import LinearStore
from vtpm_cuse.wire.blob import BlobFlag, with_header

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vtpm_cuse.storage.base import StateStore

    Step = Callable[[StateStore], None]
    Contents = dict[str, bytes]


def blob(name: str, generation: int, size: int) -> bytes:
    """Every sector of it says whose it is."""
    mark = f"{name}{generation}".encode()
    return with_header(BlobFlag(0), (mark * (size // len(mark) + 1))[:size])


FIRST = {"permall": blob("p", 1, 1400), "volatilestate": blob("v", 1, 3000)}
SMALLER, LARGER, LATER = blob("p", 2, 700), blob("p", 3, 4500), blob("p", 4, 1450)
VOLATILE = blob("v", 2, 9000)
OTHER = {"permall": blob("o", 5, 1600), "savestate": blob("s", 5, 980)}

OPERATIONS: dict[str, tuple[Contents, Step, Contents]] = {
    "first of all": ({}, lambda s: s.store("permall", SMALLER), {"permall": SMALLER}),
    "smaller": (FIRST, lambda s: s.store("permall", SMALLER), {**FIRST, "permall": SMALLER}),
    "larger": (FIRST, lambda s: s.store("permall", LARGER), {**FIRST, "permall": LARGER}),
    "volatile": (
        FIRST,
        lambda s: s.store("volatilestate", VOLATILE),
        {**FIRST, "volatilestate": VOLATILE},
    ),
    "delete": (FIRST, lambda s: s.delete("volatilestate"), {"permall": FIRST["permall"]}),
    "replace all": (FIRST, lambda s: s.replace_all(OTHER), OTHER),
}


@dataclass(frozen=True)
class Kind:
    """A store, and what it promises when an operation on several blobs is cut off."""

    name: str
    backup: bool = False
    device: int = 0

    def disk(self) -> Disk:
        return Disk(device=self.device)

    def store(self, disk: Disk, patch: pytest.MonkeyPatch) -> StateStore:
        patch.setattr(files, "os", disk)
        if self.name == "directory":
            patch.setattr(directory, "os", disk)
            return DirectoryStore("/state", tpm2=True, lock=False, backup=self.backup)
        patch.setattr(linear, "os", disk)
        return LinearStore("/state/state.bin", lock=False)

    def allowed(self, name: str, old: Contents, new: Contents) -> list[Contents]:
        """What may be there afterwards."""
        if name == "replace all" and self.name == "directory":
            return [
                old,
                {"permall": old["permall"]},
                {"permall": new["permall"]},
                new,
            ]
        return [old, new]

    def allowed_later(self, name: str, old: Contents, new: Contents) -> list[Contents]:
        """The same after LATER was stored, or not. In a directory each name is on its own."""
        before = self.allowed(name, old, new)
        if self.name == "linear":
            return [*before, *({**found, "permall": LATER} for found in before)]
        choices = [{found.get(blob) for found in before} for blob in BLOB_NAMES]
        choices[0].add(LATER)
        return [
            {blob: data for blob, data in zip(BLOB_NAMES, one, strict=True) if data is not None}
            for one in itertools.product(*choices)
        ]


KINDS = [
    Kind("directory"),
    Kind("directory", backup=True),
    Kind("linear"),
    Kind("linear", device=256 << 10),
    Kind("linear", device=27 << 10),  # no room for alignment
]
kinds = pytest.mark.parametrize(
    "kind",
    KINDS,
    ids=["directory", "directory with backup", "file", "device", "small device"],
)
operations = pytest.mark.parametrize("name", OPERATIONS)


def contents(store: StateStore) -> Contents:
    found = {}
    for name in BLOB_NAMES:
        try:
            found[name] = store.load(name)
        except StateMissing:
            continue
    return found


def prepared(kind: Kind, old: Contents, patch: pytest.MonkeyPatch) -> Disk:
    """A disk on which *old* was written in order, some of it twice."""
    disk = kind.disk()
    store = kind.store(disk, patch)
    for name, data in [*old.items(), *list(old.items())[:1]]:
        store.store(name, data)
    store.close()
    return disk


def look(kind: Kind, disk: Disk, patch: pytest.MonkeyPatch) -> Contents:
    """What a new process finds; and that it can go on."""
    disk.restart()
    store = kind.store(disk, patch)
    found = contents(store)
    if kind.backup and "tpm2-00.permall.bak" in disk.names:
        # Whole, and of a generation that once was the present one.
        kept = bytes(disk.names["tpm2-00.permall.bak"].seen)
        assert kept in {FIRST["permall"], SMALLER, LARGER, LATER, OTHER["permall"]}
    return found


def run_until(kind: Kind, disk: Disk, step: Step, patch: pytest.MonkeyPatch) -> bool:
    """Whether the operation came to its end before the power went."""
    try:
        step(kind.store(disk, patch))
    except PowerCut:
        return False
    return True


def trace(kind: Kind, disk: Disk, step: Step, patch: pytest.MonkeyPatch) -> list[str]:
    """The calls of the whole operation, done on a copy."""
    reference = disk.copied()
    reference.restart()
    assert run_until(kind, reference, step, patch)
    return reference.trace


def cuts(kind: Kind, disk: Disk, step: Step, patch: pytest.MonkeyPatch) -> Iterator[Disk]:
    """The disk with the operation cut off before each of its calls, and once done."""
    for at in range(1000):
        one = disk.copied()
        one.restart(stop=at)
        done = run_until(kind, one, step, patch)
        yield one
        if done:
            assert at > 2
            return
    pytest.fail("the operation has no end")


@kinds
@operations
def test_power_cut(kind: Kind, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old, step, new = OPERATIONS[name]
    disk = prepared(kind, old, monkeypatch)
    allowed = kind.allowed(name, old, new)
    looked = 0
    for cut in cuts(kind, disk, step, monkeypatch):
        for after in cut.after_power_cut():
            looked += 1
            assert look(kind, after, monkeypatch) in allowed, cut.trace
    assert looked > (3 if name == "delete" else 20)


@kinds
@operations
def test_what_was_acknowledged_stays(
    kind: Kind, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, step, new = OPERATIONS[name]
    disk = prepared(kind, old, monkeypatch)
    disk.restart()
    assert run_until(kind, disk, step, monkeypatch)
    for after in disk.after_power_cut():
        assert look(kind, after, monkeypatch) == new


@kinds
@operations
def test_killed_process_and_then_a_power_cut(
    kind: Kind, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the first process wrote is in the page cache only when the second one goes on."""
    old, step, new = OPERATIONS[name]
    disk = prepared(kind, old, monkeypatch)
    looked = 0
    for killed in cuts(kind, disk, step, monkeypatch):
        killed.restart()
        assert look(kind, killed, monkeypatch) in kind.allowed(name, old, new), "killed"
        allowed = kind.allowed_later(name, old, new)
        for first in cuts(kind, killed, lambda s: s.store("permall", LATER), monkeypatch):
            for after in first.after_power_cut():
                looked += 1
                assert look(kind, after, monkeypatch) in allowed, (killed.trace, first.trace)
    assert looked > 100


@kinds
@operations
def test_failed_step_and_then_a_power_cut(
    kind: Kind, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process goes on after an error; a flush that failed is not tried again by the kernel."""
    old, step, new = OPERATIONS[name]
    disk = prepared(kind, old, monkeypatch)
    calls = trace(kind, disk, step, monkeypatch)
    for at in range(len(calls)):
        for again in range(3, 12):
            one = disk.copied()
            one.restart(fault=at)
            store = kind.store(one, monkeypatch)
            with pytest.raises(StorageError):
                step(store)
            one.restart(stop=again)
            allowed = kind.allowed_later(name, old, new)
            with contextlib.suppress(PowerCut):
                store.store("permall", LATER)
            for after in one.after_power_cut():
                assert look(kind, after, monkeypatch) in allowed, (calls[at], again)


@kinds
@operations
def test_failed_step_is_told(kind: Kind, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call that fails makes the operation fail, and is no reason to find nothing."""
    old, step, new = OPERATIONS[name]
    disk = prepared(kind, old, monkeypatch)
    calls = trace(kind, disk, step, monkeypatch)
    for at, call in enumerate(calls):
        one = disk.copied()
        one.restart(fault=at)
        with pytest.raises(StorageError) as caught:
            step(kind.store(one, monkeypatch))
        assert not isinstance(caught.value, StateMissing), call
        assert look(kind, one, monkeypatch) in kind.allowed(name, old, new), call


@pytest.mark.parametrize("kind", KINDS[:3], ids=["directory", "directory with backup", "file"])
@operations
def test_full_disk(kind: Kind, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old, step, new = OPERATIONS[name]
    disk = prepared(kind, old, monkeypatch)
    used = sum(len(inode.seen) for inode in disk.names.values())
    refused = taken = 0
    for free in range(0, 32 << 10, 500):
        one = disk.copied()
        one.restart()
        one.room = used + free
        store = kind.store(one, monkeypatch)
        try:
            step(store)
        except StorageError as exc:
            assert "No space left on device" in str(exc)  # noqa: PT017 - it may also succeed
            refused += 1
            expected = kind.allowed(name, old, new)
        else:
            taken += 1
            expected = [new]
        assert contents(store) in expected
        store.close()
        for after in one.after_power_cut():
            assert look(kind, after, monkeypatch) in expected
        one.room = None
        assert look(kind, one, monkeypatch) in expected
        kind.store(one, monkeypatch).store("permall", LATER)
        assert look(kind, one, monkeypatch)["permall"] == LATER
    assert taken
    assert refused or name not in {"larger", "volatile"}


def test_device_without_room_keeps_the_old_state(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = Kind("linear", device=12 << 10)
    disk = prepared(kind, {"permall": LARGER}, monkeypatch)
    store = kind.store(disk, monkeypatch)
    with pytest.raises(StorageError, match="12288 bytes of the device have no room"):
        store.store("volatilestate", VOLATILE)
    for after in disk.after_power_cut():
        assert look(kind, after, monkeypatch) == {"permall": LARGER}


def test_flushing_can_be_left_to_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The price is what a power cut takes, never what a killed process takes."""
    for module, store in (
        (directory, DirectoryStore("/state", tpm2=True, lock=False, fsync=False, backup=True)),
        (linear, LinearStore("/state/state.bin", lock=False, fsync=False)),
    ):
        disk = Disk()
        for patched in (module, files):
            monkeypatch.setattr(patched, "os", disk)
        for _ in range(3):
            store.store("permall", SMALLER)
        store.delete("permall")
        assert not {"fsync", "fdatasync"} & set(disk.trace)


def test_no_space_is_told_by_errno(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(room=100)
    store = Kind("linear").store(disk, monkeypatch)
    with pytest.raises(StorageError) as caught:
        store.store("permall", SMALLER)
    cause = caught.value.__cause__
    assert isinstance(cause, OSError)
    assert cause.errno == errno.ENOSPC


# -- the backup in the place of the state ---------------------------------------------------

STATE, BACKUP, TRIED = "tpm2-00.permall", "tpm2-00.permall.bak", "tpm2-00.permall.tmp"
WITH_BACKUP = Kind("directory", backup=True)
KEPT, REFUSED = SMALLER, LARGER  # both have a header that fits; libtpms refused the second


def disk_with(state: bytes = b"", backup: bytes = b"", tried: bytes = b"") -> Disk:
    """On it are, flushed, what is given."""
    disk = Disk()
    for name, data in ((STATE, state), (BACKUP, backup), (TRIED, tried)):
        if data:
            disk.names[name] = Inode(seen=bytearray(data), medium=bytearray(data))
    return disk


@dataclass(frozen=True)
class Exchange:
    """An operation on a state and its backup, and what a start may find at any time after it began."""

    disk: Disk
    step: Step
    found: set[tuple[bytes, bytes]]  # state and backup


BEFORE, AFTER = (REFUSED, KEPT), (KEPT, REFUSED)


def try_it(store: StateStore) -> None:
    assert store.try_backup() == f"/state/{BACKUP}"


EXCHANGES = {
    "the backup alone": Exchange(
        disk_with(backup=KEPT), lambda s: none(s.restore_backup()), {(KEPT, KEPT)}
    ),
    "try": Exchange(disk_with(REFUSED, KEPT), try_it, {BEFORE}),
    "refused, too": Exchange(
        disk_with(KEPT, KEPT, REFUSED), lambda s: s.end_try(accepted=False), {BEFORE}
    ),
    "accepted": Exchange(
        disk_with(KEPT, KEPT, REFUSED), lambda s: s.end_try(accepted=True), {BEFORE, AFTER}
    ),
    "cut off in the C suite, first step": Exchange(
        disk_with(b"", KEPT, REFUSED), lambda s: none(s.restore_backup()), {BEFORE}
    ),
    "cut off in the C suite long ago": Exchange(
        disk_with(FIRST["permall"], KEPT, REFUSED),
        lambda s: none(s.load("permall")),
        {(FIRST["permall"], KEPT)},
    ),
}
exchanges = pytest.mark.parametrize("name", EXCHANGES)
links = pytest.mark.parametrize("links", [True, False], ids=["with links", "without links"])


def none(_result: object) -> None:
    """For what need not say what it did."""


def found_by_a_start(disk: Disk, patch: pytest.MonkeyPatch) -> tuple[bytes, bytes]:
    disk.restart()
    store = WITH_BACKUP.store(disk, patch)
    store.restore_backup()
    return store.load("permall"), bytes(disk.names[BACKUP].seen)


@links
@exchanges
def test_power_cut_while_the_backup_is_tried(
    name: str, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchange = EXCHANGES[name]
    disk = exchange.disk.copied()
    disk.links = links
    for cut in cuts(WITH_BACKUP, disk, exchange.step, monkeypatch):
        for after in [cut.copied(), *cut.after_power_cut()]:
            assert found_by_a_start(after, monkeypatch) in exchange.found, cut.trace
            WITH_BACKUP.store(after, monkeypatch).store("permall", LATER)
            assert look(WITH_BACKUP, after, monkeypatch)["permall"] == LATER


@links
@exchanges
def test_failed_step_while_the_backup_is_tried(
    name: str, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchange = EXCHANGES[name]
    disk = exchange.disk.copied()
    disk.links = links
    calls = trace(WITH_BACKUP, disk, exchange.step, monkeypatch)
    for at, call in enumerate(calls):
        one = disk.copied()
        one.restart(fault=at)
        with pytest.raises(StorageError) as caught:
            exchange.step(WITH_BACKUP.store(one, monkeypatch))
        assert not isinstance(caught.value, StateMissing), call
        assert found_by_a_start(one, monkeypatch) in exchange.found, call


@operations
def test_power_cut_without_hard_links(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old, step, new = OPERATIONS[name]
    disk = prepared(WITH_BACKUP, old, monkeypatch)
    disk.links = False
    for cut in cuts(WITH_BACKUP, disk, step, monkeypatch):
        for after in cut.after_power_cut():
            found = look(WITH_BACKUP, after, monkeypatch)
            assert found in WITH_BACKUP.allowed(name, old, new), cut.trace
