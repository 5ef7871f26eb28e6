"""Who stays on the control channel when there is room for no more."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtpm_cuse.proto.places import HELD_MAX, PLACES, Place, Places


def place(heard: float, *, known: bool = False, held: int = 0) -> Place:
    return Place(lambda: None, heard, known=known, held=held)


def full_of(*some: Place) -> tuple[Places, Place]:
    """All places are taken by *some* and known ones, in this order; and a newcomer."""
    places = Places()
    for one in [*some, *(place(50, known=True) for _ in range(PLACES - len(some)))]:
        places.take(one)
    newcomer = place(99)
    places.take(newcomer)
    return places, newcomer


def test_nobody_goes_while_there_is_room() -> None:
    places = Places()
    for number in range(PLACES):
        newcomer = place(number)
        places.take(newcomer)
        assert places.one_to_go(newcomer) is None


def test_of_the_silent_the_one_that_has_been_it_longest_goes() -> None:
    first, second, third = place(3), place(1), place(2)
    places, newcomer = full_of(first, second, third)
    gone = []
    for _ in range(3):
        one = places.one_to_go(newcomer)
        assert one
        gone.append(one)
        places.leave(one)
        places.take(place(60, known=True))
    assert gone == [second, third, first]


def test_who_has_said_half_a_request_goes_after_those_that_said_nothing() -> None:
    half, silent = place(1, held=9), place(2)
    places, newcomer = full_of(half, silent)
    assert places.one_to_go(newcomer) is silent
    places.leave(silent)
    places.take(place(60, known=True))
    assert places.one_to_go(newcomer) is half


def test_among_those_that_are_known_the_first_stays_however_silent() -> None:
    """The first is the monitor of a VM; those that come and ask and stay are some tool's."""
    monitor = place(0, known=True)
    places, newcomer = full_of(monitor)
    for heard in range(1000, 1100):
        going = places.one_to_go(newcomer)
        assert going
        assert going is not monitor
        places.leave(going)
        newcomer.known = True
        newcomer = place(heard)
        places.take(newcomer)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, HELD_MAX)), max_size=PLACES))
def test_what_is_kept_of_half_requests_gets_below_its_limit(some: list[tuple[bool, int]]) -> None:
    places = Places()
    kept = [place(number, known=known, held=held) for number, (known, held) in enumerate(some)]
    for one in kept:
        places.take(one)
    while going := places.one_to_drop():
        assert going.held, "the others would not make it less"
        places.leave(going)
        kept.remove(going)
    assert sum(one.held for one in kept) <= HELD_MAX


@pytest.mark.parametrize("known", [True, False])
def test_no_descriptor_left_costs_only_strangers_their_place(known: bool) -> None:
    places = Places()
    one = place(1, known=known)
    places.take(one)
    assert places.stranger() is (None if known else one)
