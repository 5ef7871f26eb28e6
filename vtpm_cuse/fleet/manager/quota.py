"""How much each owner may have: TPMs, and bytes on the disk."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

from vtpm_cuse.errors import FleetError
from vtpm_cuse.fleet.manager.threads import in_thread

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vtpm_cuse.fleet.manager.machine import Machine
    from vtpm_cuse.fleet.states.catalogue import Catalogue

OWNER_MAX: Final = 1024
OWNER_BYTES: Final = 1 << 30
"""A thousand TPMs that are full, and some snapshots of each."""


class Limits(NamedTuple):
    """Of one owner: how many TPMs, and bytes of all with their snapshots."""

    tpms: int = OWNER_MAX
    bytes: int = OWNER_BYTES


class Quota:
    """Looks at each TPM's folder once; who changes what is in it says so."""

    def __init__(self, catalogue: Catalogue, limits: Limits) -> None:
        self._catalogue, self._limits = catalogue, limits
        self._sizes: dict[str, int] = {}

    def changed(self, number: str) -> None:
        """The folder of the TPM with that id has something else in it, or is gone."""
        self._sizes.pop(number, None)

    async def need_room(
        self, name: str, owner: int, machines: Iterable[Machine], coming: int = 0
    ) -> None:
        """Raises FleetError where there is no room for more.

        Args:
            name: What is to be kept.
            owner: Whose.
            machines: All that there are.
            coming: How many of this owner's TPMs are yet to be, this one with them.
        """
        theirs = [one for one in machines if one.entry.owner == owner]
        if len(theirs) + coming > self._limits.tpms:
            raise FleetError("OverLimit", name, f"its owner has {len(theirs)} TPMs already")
        if new := [one for one in theirs if one.entry.id not in self._sizes]:
            await in_thread(partial(self._look, new))
        total = sum(self._sizes.get(one.entry.id, 0) for one in theirs)
        if total >= self._limits.bytes:
            reason = (
                f"its owner's TPMs take {total} bytes with their snapshots, and may not have more"
            )
            raise FleetError("OverLimit", name, reason)

    def _look(self, machines: list[Machine]) -> None:
        for one in machines:
            self._sizes[one.entry.id] = self._catalogue.size_of(one.name)
