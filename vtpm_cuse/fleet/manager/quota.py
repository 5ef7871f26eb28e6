"""How much each owner may have: TPMs, and bytes on the disk."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

import trio

from vtpm_cuse.errors import FleetError
from vtpm_cuse.fleet.manager.threads import in_thread

if TYPE_CHECKING:
    from vtpm_cuse.fleet.manager.machine import Machine
    from vtpm_cuse.fleet.states.catalogue import Catalogue

OWNER_MAX: Final = 1024
OWNER_BYTES: Final = 1 << 30
"""A thousand TPMs that are full, and some snapshots of each."""


class Limits(NamedTuple):
    """Of one owner: how many TPMs, and bytes of all with their snapshots."""

    tpms: int = OWNER_MAX
    bytes: int = OWNER_BYTES


class _Owner:
    """What one has: the sizes of folders that were looked at, and the TPMs of all others."""

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}
        self.total = 0
        self.unknown: dict[str, Machine] = {}

    def forget(self, number: str) -> None:
        self.total -= self.sizes.pop(number, 0)
        self.unknown.pop(number, None)


class Quota:
    """Looks at each TPM's folder once; who makes, changes or removes one says so."""

    def __init__(self, catalogue: Catalogue, limits: Limits) -> None:
        self._catalogue, self._limits = catalogue, limits
        self._owners: defaultdict[int, _Owner] = defaultdict(_Owner)
        self._turn = trio.Lock()

    def changed(self, machine: Machine, size: int | None = None) -> None:
        """It is new, or its folder has something else in it: so many bytes, where that is known."""
        theirs, number = self._owners[machine.entry.owner], machine.entry.id
        theirs.forget(number)
        if size is None:
            theirs.unknown[number] = machine
        else:
            theirs.sizes[number] = size
            theirs.total += size

    def removed(self, machine: Machine) -> None:
        """It is no more."""
        self._owners[machine.entry.owner].forget(machine.entry.id)

    async def need_room(self, name: str, owner: int, coming: int = 0) -> None:
        """Raises FleetError where there is no room for more.

        Args:
            name: What is to be kept.
            owner: Whose.
            coming: How many of this owner's TPMs are yet to be, this one with them.
        """
        theirs = self._owners[owner]
        count = len(theirs.sizes) + len(theirs.unknown)
        if count + coming > self._limits.tpms:
            raise FleetError("OverLimit", name, f"its owner has {count} TPMs already")
        async with self._turn:
            while theirs.unknown:
                await self._look(theirs)
        if theirs.total >= self._limits.bytes:
            reason = (
                f"its owner's TPMs take {theirs.total} bytes with their snapshots, and may not have "
                "more"
            )
            raise FleetError("OverLimit", name, reason)

    async def _look(self, theirs: _Owner) -> None:
        looked = tuple(theirs.unknown.values())
        theirs.unknown.clear()
        for machine in looked:  # they count meanwhile, and whatever else becomes of them is known
            theirs.sizes[machine.entry.id] = 0
        sizes = await in_thread(partial(self._sizes_of, [machine.name for machine in looked]))
        for machine, size in zip(looked, sizes, strict=True):
            if machine.entry.id in theirs.sizes:
                theirs.sizes[machine.entry.id] = size
                theirs.total += size

    def _sizes_of(self, names: list[str]) -> list[int]:
        return [self._catalogue.size_of(name) for name in names]
