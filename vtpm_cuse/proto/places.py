"""Which control connection has to go when more come than there are places. Sans-IO.

Who has completed a request could also have ended the TPM: against such a one nothing here
protects. Who has not may be anybody, a scanner or a health check that says nothing, and costs
those before it nothing: a VM monitor keeps one connection for as long as the VM lives, and is
silent for days.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

PLACES: Final = 32
"""Connections: a monitor, and a burst of tools; a small part of the usual 1024 descriptors."""

HELD_MAX: Final = 4 << 20
"""Bytes of requests that are not complete, of all connections: four of the longest."""


class SavedPlace(NamedTuple):
    """A connection's place as plain values: seconds since it was heard, and what is said below."""

    silent: float
    known: bool
    held: int


class Place:
    """One connection's.

    Attributes:
        end: Ends the connection.
        heard: When it came, or last said something.
        known: It has completed a request.
        held: Bytes that are kept of a request that is not complete.
    """

    def __init__(
        self, end: Callable[[], None], heard: float, *, known: bool = False, held: int = 0
    ) -> None:
        self.end = end
        self.heard = heard
        self.known = known
        self.held = held

    def suspend(self, now: float) -> SavedPlace:
        """The place as plain values."""
        return SavedPlace(now - self.heard, self.known, self.held)

    def resume(self, saved: SavedPlace, now: float) -> None:
        """As it was suspended."""
        self.heard, self.known, self.held = now - saved.silent, saved.known, saved.held


class Places:
    """All connections, in the order in which they came."""

    def __init__(self) -> None:
        self._taken: list[Place] = []

    def __len__(self) -> int:
        return len(self._taken)

    def take(self, place: Place) -> None:
        """One more; `one_to_go` says who has to go for it."""
        self._taken.append(place)

    def leave(self, place: Place) -> None:
        """The connection has ended."""
        self._taken.remove(place)

    def one_to_go(self, newcomer: Place) -> Place | None:
        """Who has to go because *newcomer*, who has had no time yet to say anything, came."""
        others = [place for place in self._taken if place is not newcomer]
        return _least(others) if len(others) >= PLACES else None

    def one_to_drop(self) -> Place | None:
        """Who has to go because too many bytes are kept."""
        holding = [place for place in self._taken if place.held]
        return _least(holding) if sum(place.held for place in holding) > HELD_MAX else None

    def stranger(self) -> Place | None:
        """Who has to go because nothing is left to serve another one with."""
        return _least([place for place in self._taken if not place.known])


def _least(places: list[Place]) -> Place | None:
    """The one that has been silent longest and is not known; else the last of those that are."""
    strangers = [place for place in places if not place.known]
    if strangers:
        return min(strangers, key=lambda place: (place.held > 0, place.heard))
    return places[-1] if places else None
