"""Sessions of all connections: who owns which, and that none grows too old to be saved.

A session's handle is part of what is authorized with it, so it stays the TPM's. Saved sessions are
kept in the order of their contexts' numbers. The TPM refuses to save (TPM_RC_CONTEXT_GAP) when its
counter has run too far past the oldest one, which is therefore loaded and saved again in time: a
client never sees that code. Source: TCG TPM 2.0 Library Part 1, "Session Context Management".
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final

from vtpm_cuse.errors import TpmError
from vtpm_cuse.resmgr.refusal import LAYER, Dead, Refusal
from vtpm_cuse.resmgr.saved import SavedSession, SavedSessions
from vtpm_cuse.wire.tpm import TpmRc
from vtpm_cuse.wire.tpm2_handles import Context, index_of

if TYPE_CHECKING:
    from collections.abc import Collection

    from vtpm_cuse.resmgr.inner import Inner

_DEAD: Final = frozenset({TpmRc.TPM_RC_HANDLE_P1, TpmRc.TPM_RC_INTEGRITY_P1})


class Place(Enum):
    """Where a session is."""

    LOADED = "loaded"
    SWAPPED = "swapped"  # saved by us: its owner sees it as loaded
    SAVED = "saved"  # by its owner, who has a context that says so


@dataclass(slots=True, eq=False)
class Session:
    """An active session.

    Attributes:
        handle: The TPM's, with its kind.
        owner: Number of the connection; None when it was closed and left it saved.
        place: Where it is.
        context: Its newest saved context, where it is not loaded.
        sequence: The number of that.
        digest: Of the context that its owner was given and can load once.
        used: When it was last used, in the manager's count of commands.
    """

    handle: int
    owner: int | None
    place: Place = Place.LOADED
    context: bytes = b""
    sequence: int = 0
    digest: bytes = b""
    used: int = 0

    @property
    def index(self) -> int:
        """What tells it apart."""
        return index_of(self.handle)

    @property
    def foreign(self) -> bool:
        """Another manager's clients have left it saved, of which they alone have the context."""
        return self.place is not Place.LOADED and not self.context

    @property
    def loads_elsewhere(self) -> bool:
        """Whether the context that a client was given is the newest, and so needs no manager."""
        return self.foreign or (
            self.place is Place.SAVED and self.digest == digest_of(self.context)
        )

    def suspend(self) -> SavedSession:
        """As plain values."""
        place = self.place.value
        return SavedSession(
            *(self.handle, self.owner, place, self.context, self.sequence, self.digest, self.used)
        )

    @classmethod
    def resumed(cls, saved: SavedSession) -> Session:
        """As it was suspended."""
        handle, owner, place, context, sequence, digest, used = saved
        return cls(handle, owner, Place(place), context, sequence, digest, used)


def digest_of(context: bytes) -> bytes:
    """Stands for a context that a client holds."""
    return hashlib.sha256(context).digest()


class Sessions:
    """Those of one TPM, which holds *slots* loaded ones, and whose counter may run *gap* ahead."""

    def __init__(self, inner: Inner, slots: int, gap: int) -> None:
        self._inner = inner
        self.slots = slots
        self.gap = gap
        self._by_index: dict[int, Session] = {}
        self._saved: dict[int, Session] = {}  # the oldest first
        self.evictions = self.refreshes = 0

    def lose_power(self) -> None:
        """What was loaded is gone; for its owner, what is swapped out is, too."""
        for found in list(self._by_index.values()):
            if found.place is Place.LOADED:
                self.remove(found)
            elif found.place is Place.SWAPPED:
                found.owner = None  # `start` ends it

    def start(self, slots: int, gap: int, saved: Collection[int]) -> None:
        """The TPM is there, with *saved* sessions: only what it still has is, and has an owner."""
        self.slots, self.gap = slots, gap
        self.evictions = self.refreshes = 0
        there = {index_of(handle) for handle in saved}
        for found in list(self._by_index.values()):
            if found.index not in there:
                self.remove(found)
            elif found.place is Place.SWAPPED:
                self._drop(found)

    def suspend(self) -> SavedSessions:
        """All of them as plain values."""
        loaded = (one for one in self._by_index.values() if one.place is Place.LOADED)
        sessions = tuple(one.suspend() for one in (*loaded, *self._saved.values()))
        return SavedSessions(self.slots, self.gap, sessions, self.evictions, self.refreshes)

    def resume(self, saved: SavedSessions) -> None:
        """As they were suspended; called once, before anything else."""
        self.evictions, self.refreshes = saved.evictions, saved.refreshes
        for found in map(Session.resumed, saved.sessions):
            self._by_index[found.index] = found
            if found.place is not Place.LOADED:
                self._saved[found.index] = found

    def find(self, handle: int) -> Session | None:
        """The session of a handle, whatever kind that claims."""
        return self._by_index.get(index_of(handle))

    def of(self, owner: int | None) -> list[Session]:
        """Those of a connection, by index; of None, the abandoned ones, the oldest first."""
        if owner is None:
            saved = self._saved.values()
            return [one for one in saved if one.owner is None and one.place is Place.SAVED]
        return [found for _, found in sorted(self._by_index.items()) if found.owner == owner]

    @property
    def active(self) -> int:
        """How many there are."""
        return len(self._by_index)

    @property
    def owned(self) -> int:
        """How many of them are somebody's."""
        return sum(found.owner is not None for found in self._by_index.values())

    def count(self, owners: Collection[int]) -> int:
        """How many of them are these connections'."""
        return sum(found.owner in owners for found in self._by_index.values())

    def add(self, found: Session) -> None:
        """Takes one that has just been started or loaded; who had its number has lost it."""
        self._saved.pop(found.index, None)
        self._by_index[found.index] = found

    def adopt(self, handle: int) -> None:
        """Takes one that is saved, of which nobody here has the context, as abandoned."""
        found = Session(handle, None, Place.SAVED)
        self._by_index[found.index] = self._saved[found.index] = found

    def remove(self, found: Session) -> None:
        """It has ended."""
        if self._by_index.get(found.index) is found:
            del self._by_index[found.index]
            self._saved.pop(found.index, None)

    def flush(self, found: Session) -> None:
        """Ends it. Raises TpmError."""
        self.remove(found)
        self._inner.flush(found.handle)

    def saved_by_owner(self, found: Session, context: bytes) -> None:
        """Its owner has saved it, and was given *context*."""
        self._note(found, context, Place.SAVED)
        found.digest = digest_of(context)
        self._refresh_in_time()

    def _note(self, found: Session, context: bytes, place: Place) -> None:
        head = Context.of(context)
        found.context, found.place = context, place
        found.sequence = head.sequence if head else found.sequence
        self._saved.pop(found.index, None)
        self._saved[found.index] = found

    def load_all(self, wanted: Collection[Session]) -> None:
        """Loads all of them, at once.

        Raises:
            Dead: One has ended; its ``args`` is that session.
            Refusal: They cannot be.
        """
        for found in wanted:
            if found.place is not Place.LOADED:
                self.make_room(wanted)
                self.load(found, wanted)

    def make_room(self, keep: Collection[Session]) -> None:
        """So that one more can be loaded, if that can be. Raises Refusal."""
        loaded = sum(found.place is Place.LOADED for found in self._by_index.values())
        while loaded >= self.slots and self.evict(keep):
            loaded -= 1

    def evict(self, keep: Collection[Session]) -> bool:
        """Saves one that is not in *keep*; False if there is none. Raises Refusal."""
        candidates = [
            found
            for found in self._by_index.values()
            if found.place is Place.LOADED and found not in keep
        ]
        if not candidates:
            return False
        victim = min(candidates, key=lambda found: found.used)
        while True:
            try:
                context = self._inner.save(victim.handle)
            except TpmError as exc:
                if exc.code == TpmRc.TPM_RC_CONTEXT_GAP and self.refresh_oldest():
                    continue
                if exc.code == TpmRc.TPM_RC_REFERENCE_H0:
                    self.remove(victim)
                    return True
                raise Refusal(exc.code) from exc
            break
        self._note(victim, context, Place.SWAPPED)
        self.evictions += 1
        self._refresh_in_time()
        return True

    def load(self, found: Session, keep: Collection[Session]) -> None:
        """Loads one. Raises Dead, Refusal."""
        while True:
            try:
                self._inner.load(found.context)
            except TpmError as exc:
                if exc.code == TpmRc.TPM_RC_SESSION_MEMORY and self.evict(keep):
                    continue
                if exc.code == TpmRc.TPM_RC_CONTEXT_GAP and self.refresh_oldest():
                    continue
                if exc.code in _DEAD:
                    self.remove(found)
                    raise Dead(found) from exc
                raise Refusal(exc.code) from exc
            break
        found.place, found.context = Place.LOADED, b""
        self._saved.pop(found.index, None)

    def _refresh_in_time(self) -> None:
        """Right after a save, when a slot is free; one a save is enough, for ages spread out."""
        oldest = next(found for found in self._saved.values() if not found.foreign)
        newest = next(reversed(self._saved.values()))
        if newest.sequence - oldest.sequence > self.gap // 2:
            self._refresh(oldest)

    def refresh_oldest(self) -> bool:
        """Makes the oldest saved session the newest; False where there is none to be had.

        One that nobody here can load is ended, or nothing could be saved any more.
        """
        while self._saved:
            oldest = next(iter(self._saved.values()))
            if oldest.foreign:
                self._drop(oldest)
                return True
            refreshed = self._refresh(oldest)
            if refreshed is not None:
                return refreshed
        return False

    def _refresh(self, found: Session) -> bool | None:
        """Loads and saves one; False where that cannot be, None where it had ended."""
        try:
            self._inner.load(found.context)
            context = self._inner.save(found.handle)
        except TpmError as exc:
            if exc.code in _DEAD:
                self.remove(found)
                return None
            return False
        self._note(found, context, found.place)
        self.refreshes += 1
        return True

    def abandon(self, owner: int) -> None:
        """A connection is closed: what it saved may be loaded by others."""
        for found in self.of(owner):
            if found.place is Place.SAVED:
                found.owner = None
            else:
                self._drop(found)

    def bound(self, most: int) -> None:
        """Ends the oldest of the abandoned sessions, but for *most* of them."""
        for found in self.of(None)[: -most or None]:
            self._drop(found)

    def drop_all(self) -> None:
        """Ends every session."""
        for found in list(self._by_index.values()):
            self._drop(found)

    def drop_useless(self) -> None:
        """Ends every session but those that their clients can load from another TPM's manager."""
        for found in list(self._by_index.values()):
            if not found.loads_elsewhere:
                self._drop(found)

    def drop_abandoned(self) -> bool:
        """Ends the oldest abandoned session; False if there is none."""
        abandoned = self.of(None)
        if abandoned:
            self._drop(abandoned[0])
        return bool(abandoned)

    def _drop(self, found: Session) -> None:
        try:
            self.flush(found)
        except TpmError:
            return  # it had ended already

    def refuse_unowned(self, handle: int, owner: int, code: int) -> Session:
        """The session of a handle that its owner may use now. Raises Refusal with *code*."""
        found = self.find(handle)
        if found is None or found.owner != owner or found.place is Place.SAVED:
            raise Refusal(LAYER | code)
        return found
