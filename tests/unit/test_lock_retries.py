"""How often, and how long, a vTPM asks for the lock of a state that another process has."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.engine import FakeEngine
from tests.support.stores import FailingStore
from vtpm_cuse.errors import StateLocked
from vtpm_cuse.storage.sealed import SealedStore
from vtpm_cuse.vtpm.vtpm import Vtpm

if TYPE_CHECKING:
    from collections.abc import Callable


def make() -> tuple[Vtpm, FailingStore]:
    store = FailingStore()
    vtpm = Vtpm(FakeEngine(), SealedStore(store))
    vtpm.start()
    return vtpm, store


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What would have been slept; no test waits for it."""
    taken: list[float] = []
    monkeypatch.setattr("time.sleep", taken.append)
    return taken


@pytest.mark.parametrize(("retries", "seconds"), [(0, 0), (1, 0.01), (300, 3), (10_000, 60)])
def test_lock_is_tried_again_for_a_minute_at_most(
    retries: int, seconds: float, pauses: list[float]
) -> None:
    vtpm, store = make()
    store.locks = 0
    store.faults["lock"] = StateLocked("/x/.lock", "taken")
    with pytest.raises(StateLocked):
        vtpm.lock_storage(retries)
    assert sum(pauses) == pytest.approx(seconds)
    assert store.locks == len(pauses) + 1


def at_pause(
    count: int, happens: Callable[[], None], pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the pause with that number something happens."""

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == count:
            happens()

    monkeypatch.setattr("time.sleep", sleep)


def test_lock_that_comes_free_is_taken(
    pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    vtpm, store = make()
    store.faults["lock"] = StateLocked("/x/.lock", "taken")

    at_pause(3, store.faults.clear, pauses, monkeypatch)
    vtpm.lock_storage(300)
    assert len(pauses) == 3


def test_who_is_to_end_does_not_wait_for_a_lock(
    pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal in the middle of the retries ends them at the next."""
    vtpm, store = make()
    store.faults["lock"] = StateLocked("/x/.lock", "taken")

    at_pause(5, vtpm.abort, pauses, monkeypatch)
    with pytest.raises(StateLocked):
        vtpm.lock_storage(300)
    assert len(pauses) == 5
