"""What an owner may have is known without a look at all that there is."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, cast

import pytest

from tests.support.fleet import in_trio
from vtpm_cuse.errors import FleetError
from vtpm_cuse.fleet.manager.quota import Limits, Quota
from vtpm_cuse.fleet.states.catalogue import Catalogue, Entry

if TYPE_CHECKING:
    from vtpm_cuse.fleet.manager.machine import Machine


class FakeMachine(NamedTuple):
    name: str
    entry: Entry


class FakeCatalogue:
    """Folders of 100 bytes, but for those in `sizes`; `looks` has what was looked at."""

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}
        self.looks: list[str] = []

    def size_of(self, name: str) -> int:
        self.looks.append(name)
        return self.sizes.get(name, 100)


def machine(name: str, owner: int = 1) -> Machine:
    return cast("Machine", FakeMachine(name, Entry(f"id of {name}", owner, None, False, ())))


def quota_of(catalogue: FakeCatalogue, **limits: int) -> Quota:
    return Quota(cast("Catalogue", catalogue), Limits(**limits))


@in_trio
async def test_each_folder_is_looked_at_once_until_it_changes() -> None:
    catalogue = FakeCatalogue()
    quota = quota_of(catalogue, bytes=1000)
    made = [machine(f"t{number}") for number in range(9)]
    for one in made:
        await quota.need_room(one.name, 1, coming=1)
        quota.changed(one)
    quota.changed(machine("another's", owner=2))
    await quota.need_room("t9", 1)
    assert catalogue.looks == [one.name for one in made]
    catalogue.sizes["t3"] = 200
    await quota.need_room("t9", 1)
    quota.changed(made[3])
    with pytest.raises(FleetError, match="take 1000 bytes"):
        await quota.need_room("t9", 1)
    assert catalogue.looks[len(made) :] == ["t3"]
    await quota.need_room("t9", 2)


@in_trio
async def test_what_is_gone_counts_no_more() -> None:
    quota = quota_of(FakeCatalogue(), tpms=2, bytes=200)
    one, two = machine("one"), machine("two")
    quota.changed(one)
    quota.removed(one)
    quota.changed(one)
    quota.changed(two)
    with pytest.raises(FleetError, match="has 2 TPMs already"):
        await quota.need_room("three", 1, coming=1)
    with pytest.raises(FleetError, match="take 200 bytes"):
        await quota.need_room("one", 1)
    for gone in (one, one):
        quota.removed(gone)
    await quota.need_room("three", 1, coming=1)


@in_trio
async def test_one_that_is_removed_while_it_is_looked_at_counts_no_more() -> None:
    catalogue = FakeCatalogue()
    quota = quota_of(catalogue, bytes=100)
    one = machine("one")

    class Removing(FakeCatalogue):
        def size_of(self, name: str) -> int:
            quota.removed(one)
            return super().size_of(name)

    quota._catalogue = cast("Catalogue", Removing())
    quota.changed(one)
    await quota.need_room("two", 1)
    quota.changed(machine("two"))
    quota._catalogue = cast("Catalogue", catalogue)
    with pytest.raises(FleetError, match="take 100 bytes"):
        await quota.need_room("three", 1)
