"""TPMs that wait: each handed out once, none of an earlier configuration."""

from __future__ import annotations

import os
import signal
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from tests.support import commands as tpm
from tests.support.fleet import UID, Client, filled, fleet, in_trio, until
from vtpm_cuse.errors import UsageError
from vtpm_cuse.fleet.base import Spec
from vtpm_cuse.fleet.manager import pool as pool_module
from vtpm_cuse.fleet.manager.making import Made
from vtpm_cuse.fleet.manager.pool import POOL, PlainPool, Pool
from vtpm_cuse.fleet.manager.volatile import WAITING, FirstStarts
from vtpm_cuse.fleet.states.catalogue import Catalogue

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vtpm_cuse.fleet.manager.manager import Manager


class Factory:
    """Stands for the set-up.

    Attributes:
        patient: Of all that were asked for, whether they could wait.
        fails: Nothing can be made.
    """

    def __init__(self) -> None:
        self.patient: list[bool] = []
        self.fails = False

    async def manufacture(
        self, _folder: str, number: str, profile: str | None, *, patient: bool
    ) -> Made:
        """See `fleet.making`."""
        await trio.lowlevel.checkpoint()
        self.patient.append(patient)
        if self.fails:
            raise UsageError("no CA")
        return Made(number, f"{len(self.patient)} {profile}".encode())


@pytest.fixture
def factory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Factory:
    """With a configuration of its own."""
    found = Factory()
    monkeypatch.setattr(pool_module, "manufacture", found.manufacture)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return found


@pytest.fixture
def catalogue(tmp_path: Path) -> Iterator[Catalogue]:
    found = Catalogue(str(tmp_path / "state"))
    yield found
    found.close()


@in_trio
async def test_each_is_handed_out_once_and_made_ahead(
    factory: Factory, catalogue: Catalogue
) -> None:
    async with trio.open_nursery() as nursery:
        pool = Pool(catalogue, nursery, 3)
        await filled(pool, 3)
        made: list[Made] = []

        async def take() -> None:
            made.append(await pool.take(None))

        async with trio.open_nursery() as all_at_once:
            for _ in range(8):
                all_at_once.start_soon(take)
        await filled(pool, 3)
    assert len({one.id for one in made}) == len({one.permanent for one in made}) == 8
    assert factory.patient[:3] == [True] * 3


@in_trio
async def test_none_waits_before_the_first_is_wanted(
    factory: Factory, catalogue: Catalogue
) -> None:
    async with trio.open_nursery() as nursery:
        pool = Pool(catalogue, nursery, None)
        await trio.testing.wait_all_tasks_blocked()
        assert factory.patient == []
        assert (await pool.take("another")).permanent == b"1 another"
        await filled(pool, POOL)
        # One of another profile is never the pool's.
        assert (await pool.take("another")).permanent == b"4 another"
        assert (await pool.take(None)).permanent == b"2 None"


@in_trio
async def test_a_change_of_the_configuration_counts_at_once(
    factory: Factory, catalogue: Catalogue, tmp_path: Path
) -> None:
    async with trio.open_nursery() as nursery:
        pool = Pool(catalogue, nursery, 2)
        await filled(pool, 2)
        (tmp_path / "swtpm_setup.conf").write_text("create_certs_tool = swtpm_localca\n")
        assert (await pool.take(None)).permanent == b"3 None"
        assert factory.patient[2] is False


@in_trio
async def test_a_failure_is_told_to_who_wants_one(factory: Factory, catalogue: Catalogue) -> None:
    factory.fails = True
    async with trio.open_nursery() as nursery:
        pool = Pool(catalogue, nursery, 2)
        with pytest.raises(UsageError, match="no CA"):
            await pool.take(None)
        factory.fails = False
        await pool.take(None)
        await filled(pool, 2)


@in_trio
async def test_each_plain_one_is_handed_out_once_too(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str | None] = []

    async def make(_workers: object, number: str, profile: str | None) -> Made:
        await trio.lowlevel.checkpoint()
        asked.append(profile)
        return Made(number, f"{len(asked)} {profile}".encode())

    monkeypatch.setattr(pool_module, "make", make)
    async with trio.open_nursery() as nursery:
        pool = PlainPool(None, nursery)  # type: ignore[arg-type]  # whoever makes them
        await trio.testing.wait_all_tasks_blocked()
        assert asked == []
        made = [await pool.take(None)]
        await filled(pool, POOL)
        assert (await pool.take("another")).permanent == b"4 another"
        made += [await pool.take(None) for _ in range(4)]
    assert [one.permanent[2:] for one in made] == [b"None"] * 5
    assert len({one.id for one in made}) == len({one.permanent for one in made}) == 5


async def _first_words(manager: Manager, name: str) -> tuple[tuple[int, int], bytes]:
    """Of one that is started, asked, and stopped: resets, restarts, a random number."""
    client = await Client.of(await manager.start(name))
    clock = await client.ask(tpm.TPM2_READ_CLOCK)
    resets, restarts = struct.unpack_from(">II", clock, 26)
    answer = await client.ask(tpm.get_random(16))
    await manager.stop(name)
    return (resets, restarts), answer


@in_trio
async def test_one_that_was_powered_on_ahead_goes_on_from_there_once(tmp_path: Path) -> None:
    async with fleet(tmp_path) as manager:

        def state_of(name: str) -> Path:
            return Path(manager._catalogue.state_of(name), "tpm2-00.permall")

        for name in ("one", "two", "three"):
            await manager.create(Spec(name, UID))
        before = state_of("one").read_bytes()
        found = await manager.start("one")
        first = await (await Client.of(found)).ask(tpm.get_random(16))
        assert found.pid is not None
        os.kill(found.pid, signal.SIGKILL)
        await until(manager, "one", "failed")
        assert state_of("one").read_bytes() == before  # it is on since before it had a name
        await manager.stop("one")
        again = await _first_words(manager, "one")
        two = await _first_words(manager, "two")
        assert (two[0], again[0]) == ((1, 0), (2, 0))
        # Of another state, as of a snapshot, it is powered on cold.
        state_of("three").write_bytes(state_of("two").read_bytes())
        three = await _first_words(manager, "three")
        assert three[0] == (1, 1)
        assert len({first, again[1], two[1], three[1]}) == 4


def test_what_new_ones_go_on_from_is_of_the_newest_and_of_their_state() -> None:
    found = FirstStarts()
    for number in range(WAITING + 1):
        found.put(Made(str(number), b"state", b"volatile"))
    assert found.take("0", b"state") is None
    taken = found.take("1", b"state")
    assert taken is not None
    assert (taken.take(), taken.take()) == (b"volatile", b"")
    assert found.take("1", b"state") is None
    assert found.take("2", b"another state") is None
    assert found.take("2", b"state") is None
    for gone in ("3", "unknown"):
        found.forget(gone)
        assert found.take(gone, b"state") is None
    found.put(Made("cold", b"state"))
    assert found.take("cold", b"state") is None
