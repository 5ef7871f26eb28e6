"""Whose the state of a vTPM is: every transition, and every one that cannot be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

from tests.support.stores import FailingStore
from vtpm_cuse.errors import PtmError, StateLocked, StorageError
from vtpm_cuse.vtpm.custody import TRANSITIONS, Custody, Step, Whose

if TYPE_CHECKING:
    from collections.abc import Callable

OURS, HELD, INCOMING = Whose.OURS_TO_LOCK, Whose.HELD, Whose.INCOMING
HANDED_OUT, LOST = Whose.HANDED_OUT, Whose.LOST
LOCK, HAND_OUT, MISS = Step.LOCK, Step.HAND_OUT, Step.MISS
TAKEN: Final = StateLocked("/x/.lock", "taken")

# Written out a second time: the other one is under test.
EXPECTED: Final = [
    (OURS, LOCK, HELD),
    (HELD, LOCK, HELD),
    (HELD, HAND_OUT, HANDED_OUT),
    (INCOMING, LOCK, HELD),
    (INCOMING, MISS, LOST),
    (INCOMING, HAND_OUT, HANDED_OUT),
    (HANDED_OUT, LOCK, HELD),
    (HANDED_OUT, MISS, LOST),
    (HANDED_OUT, HAND_OUT, HANDED_OUT),
    (LOST, LOCK, HELD),
    (LOST, MISS, LOST),
    (LOST, HAND_OUT, LOST),
]
FORBIDDEN: Final = [(OURS, HAND_OUT), (OURS, MISS), (HELD, MISS)]


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What would have been slept; no test waits for it."""
    taken: list[float] = []
    monkeypatch.setattr("time.sleep", taken.append)
    return taken


class Place(FailingStore):
    """Remembers what was done to its lock."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[str] = []

    def lock(self) -> None:
        super().lock()
        self.done.append("lock")

    def unlock(self) -> None:
        super().unlock()
        self.done.append("unlock")


def custody_of(whose: Whose, blobs: Place | None = None) -> Custody:
    """As if it had come to be so."""
    found = Custody(Place() if blobs is None else blobs, incoming=whose is INCOMING)
    ways: dict[Whose, tuple[Step, ...]] = {
        HELD: (LOCK,),
        HANDED_OUT: (LOCK, HAND_OUT),
        LOST: (LOCK, HAND_OUT, MISS),
    }
    for step in ways.get(whose, ()):
        found.go(step)
    assert found.whose is whose
    return found


def do(custody: Custody, blobs: Place, step: Step) -> None:
    """What a caller does for this to happen."""
    if step is HAND_OUT:
        custody.hand_out()
    elif step is MISS:
        blobs.faults["lock"] = TAKEN
        assert not custody.take_back()
    else:
        custody.lock()


@pytest.mark.parametrize(("before", "step", "after"), EXPECTED)
@pytest.mark.usefixtures("pauses")
def test_transition(before: Whose, step: Step, after: Whose) -> None:
    blobs = Place()
    custody = custody_of(before, blobs)
    do(custody, blobs, step)
    assert custody.whose is after
    assert custody.away is (after not in {OURS, HELD})
    assert blobs.done == {LOCK: ["lock"], HAND_OUT: ["unlock"], MISS: []}[step]


@pytest.mark.parametrize(("before", "step"), FORBIDDEN)
@pytest.mark.usefixtures("pauses")
def test_what_cannot_happen_does_nothing(before: Whose, step: Step) -> None:
    blobs = Place()
    custody = custody_of(before, blobs)
    with pytest.raises(RuntimeError, match=f"a state that is {before.value} cannot be"):
        do(custody, blobs, step)
    assert custody.whose is before
    assert blobs.done == []


def test_every_case_is_one_of_these() -> None:
    cases = [(before, step) for before, step, _ in EXPECTED] + FORBIDDEN
    assert sorted(map(str, cases)) == sorted(str((w, s)) for w in Whose for s in Step)
    assert len(TRANSITIONS) == len(EXPECTED)


@pytest.mark.parametrize(
    ("whose", "seconds"), [(OURS, 0), (HELD, 0), (INCOMING, 0), (HANDED_OUT, 3), (LOST, 3)]
)
def test_how_long_it_is_waited_for(whose: Whose, seconds: float, pauses: list[float]) -> None:
    """Only for a lock that somebody may be about to give back."""
    blobs = Place()
    custody = custody_of(whose, blobs)
    blobs.faults["lock"] = TAKEN
    with pytest.raises(StateLocked):
        custody.lock()
    assert sum(pauses) == pytest.approx(seconds)
    assert custody.whose is whose


@pytest.mark.parametrize("fault", [StorageError("/x", "no such disk")])
def test_other_faults_are_not_tried_again(fault: StorageError, pauses: list[float]) -> None:
    blobs = Place()
    custody = custody_of(HANDED_OUT, blobs)
    blobs.faults["lock"] = fault
    assert not custody.take_back()
    assert custody.whose is LOST
    assert pauses == []


@pytest.mark.parametrize("whose", list(Whose))
def test_what_writes_needs_the_lock_and_does_not_wait(whose: Whose, pauses: list[float]) -> None:
    blobs = Place()
    custody = custody_of(whose, blobs)
    blobs.faults["lock"] = TAKEN
    if custody.away:
        with pytest.raises(PtmError) as caught:
            custody.need()
        assert caught.value.result == 9
    else:
        custody.need()
    assert pauses == []
    assert custody.whose is whose
    blobs.faults.clear()
    custody.need()
    assert not custody.away


@pytest.mark.parametrize("act", [Custody.hand_out, Custody.lock, Custody.need])
def test_without_a_place_there_is_nothing_to_give(act: Callable[[Custody], None]) -> None:
    custody = Custody(None, incoming=False)
    act(custody)
    assert not custody.away


@pytest.mark.parametrize("whose", list(Whose))
def test_it_outlives_a_suspension(whose: Whose) -> None:
    saved = custody_of(whose).suspend()
    assert type(saved) is str
    blobs = Place()
    resumed = Custody(blobs, incoming=whose is not INCOMING)
    resumed.resume(saved)
    assert resumed.whose is whose
    assert resumed.away is (whose not in {OURS, HELD})
    assert blobs.done == (["lock"] if whose is HELD else [])


def test_what_was_held_and_is_another_process_now_is_not_resumed(pauses: list[float]) -> None:
    blobs = Place()
    blobs.faults["lock"] = TAKEN
    custody = Custody(blobs, incoming=False)
    with pytest.raises(StateLocked):
        custody.resume(HELD.value)
    assert custody.whose is OURS
    assert pauses == []
