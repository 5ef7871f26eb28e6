"""The power goes at every step of all that a manager does with its folders, and each step fails once.

A TPM is there whole or not at all, as it was or as it is to be; no other one is touched, and the
next manager starts.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio

from tests.support.fleet import UID, in_trio
from tests.support.tree import Tree, written
from vtpm_cuse.errors import FleetError
from vtpm_cuse.fleet.base import Bundle, Spec
from vtpm_cuse.fleet.manager import pool
from vtpm_cuse.fleet.manager.making import Made
from vtpm_cuse.fleet.manager.manager import Manager, Settings
from vtpm_cuse.fleet.manager.sleepers import Sleepers
from vtpm_cuse.fleet.states.catalogue import Catalogue
from vtpm_cuse.fleet.states.vault import Vault
from vtpm_cuse.wire.blob import BlobFlag, BlobTag, tlv, with_header

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    Operation = Callable[[Manager], Awaitable[object]]
    Found = dict[str, Any]

ID: Final = "6c1dd2ba-9d67-4fb1-8f4c-9a5a35d6e9f4"


def permall(number: int) -> bytes:
    """That of one TPM."""
    return b"\0\0\xab\x36\x47\x23" + bytes([number]) * 2000


def imported(number: int) -> Bundle:
    blob = with_header(BlobFlag(0), tlv(BlobTag.DATA, permall(number)))
    return Bundle(ID, Spec("new", UID), blob)


OPERATIONS: Final[dict[str, Operation]] = {
    "create": lambda m: m.create(Spec("new", UID, labels=(("a", "b"),))),
    "import": lambda m: m.take_in(imported(9)),
    "clone": lambda m: m.clone("one", "new"),
    "rm": lambda m: m.remove("one"),
    "rename": lambda m: m.update("one", "new"),
    "labels": lambda m: m.update("one", labels=(("c", "d"),)),
    "snapshot": lambda m: m.snapshot("one", "later"),
    "restore": lambda m: m.restore("one", "before"),
}


@contextlib.asynccontextmanager
async def managing(folder: str) -> AsyncIterator[Manager]:
    """A manager whose TPMs are never started, nor made by a worker."""
    catalogue = Catalogue(folder)
    sleepers: Any = Sleepers()
    try:
        async with trio.open_nursery() as nursery:
            settings = Settings(folder, f"{folder}.run")
            nobody: Any = None
            yield Manager(settings, catalogue, nobody, sleepers, nursery, None)
            nursery.cancel_scope.cancel()
    finally:
        sleepers.close()
        catalogue.close()


@pytest.fixture(autouse=True)
def makers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first two are different ones. No disk is waited for: `Tree` knows what is flushed."""
    for flush in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, flush, lambda _fd: None)
    made = iter((2, 3))

    async def make(_workers: object, number: str, _profile: str | None) -> Made:
        await trio.lowlevel.checkpoint()
        return Made(number, permall(next(made, 4)))

    monkeypatch.setattr(pool, "make", make)
    monkeypatch.setattr(pool, "_PAUSE_SECONDS", 0.0)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """Of two TPMs, one of which has a snapshot of what it was before."""
    path = str(tmp_path / "state")

    async def filled() -> None:
        async with managing(path) as manager:
            for name in ("one", "two"):
                await manager.create(Spec(name, UID))
            await manager.snapshot("one", "before")
            vault = Vault(manager._catalogue.state_of("one"))
            vault.begin(permall(1))
            vault.close()

    trio.run(filled)
    return path


def found_in(folder: str) -> Found:
    """What the next manager finds; each TPM with its state and its snapshots, whole."""
    catalogue = Catalogue(folder)
    try:
        return {
            name: (entry.id, entry.labels, *_states(catalogue, name))
            for name, entry in catalogue.entries().items()
        }
    finally:
        catalogue.close()


def _states(catalogue: Catalogue, name: str) -> tuple[bytes, dict[str, bytes]]:
    snapshots = {}
    kept = os.path.join(catalogue.path, name, "snapshots")
    for snapshot in os.listdir(kept) if os.path.exists(kept) else ():
        snapshots[snapshot] = _permanent(catalogue.need_snapshot(name, snapshot))
    return _permanent(catalogue.state_of(name)), snapshots


def _permanent(folder: str) -> bytes:
    vault = Vault(folder)
    try:
        return vault.permanent()[6:10]
    finally:
        vault.close()


def one_of(found: Found, before: Found, after: Found) -> bool:
    """Whether all is as before, or as after it; the id of one that is new is of chance."""

    def known(some: Found) -> object:
        return {name: ("" if name == "new" else one[0], *one[1:]) for name, one in some.items()}

    return known(found) in (known(before), known(after))


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_power_goes_at_every_step(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    tree, before = Tree(folder), found_in(folder)
    outcomes: dict[frozenset[Any], dict[str, bytes | None]] = {}

    def cut() -> None:
        for files in tree.after_power_cut():
            outcomes.setdefault(frozenset(files.items()), files)

    tree.at_step = cut

    async def operate() -> None:
        async with managing(folder) as manager:
            with monkeypatch.context() as patch:
                tree.watch(patch)
                await OPERATIONS[name](manager)
                tree.at_step()

    trio.run(operate)
    after = found_in(folder)
    assert after != before
    assert len(outcomes) > 1
    done = 0
    for files in outcomes.values():
        with tempfile.TemporaryDirectory(dir=tmp_path) as place:
            written(files, place)
            found = found_in(place)
            assert one_of(found, before, after), sorted(files)
            done += found == after
            assert not [
                entry for entry in os.listdir(place) if entry.startswith(".") and entry != ".lock"
            ]
    assert done
    # What was answered is there.
    for files in tree.after_power_cut():
        with tempfile.TemporaryDirectory(dir=tmp_path) as place:
            written(files, place)
            assert found_in(place) == after


@pytest.mark.parametrize("name", OPERATIONS)
@in_trio
async def test_every_step_fails_once(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    before, refused, fault, steps = found_in(folder), 0, 0, 1
    after: Found = {}
    while fault <= steps:  # the first time none fails
        place = str(tmp_path / f"copy{fault}")
        shutil.copytree(folder, place)
        tree = Tree(place, fault=fault - 1, fails=OSError(errno.ENOSPC, "it is full"))
        async with managing(place) as manager:
            with monkeypatch.context() as patch:
                tree.watch(patch)
                try:
                    await OPERATIONS[name](manager)
                except FleetError:
                    refused += 1
            named = {tpm.name for tpm in await manager.list()}
        found = found_in(place)
        after, steps = after or found, max(steps, tree.steps)
        assert one_of(found, before, after)
        assert set(found) == named, fault
        async with managing(place) as manager:
            if one_of(found, before, before):  # nothing of it is in the way
                await OPERATIONS[name](manager)
        assert one_of(found_in(place), after, after), fault
        fault += 1
    assert refused
