"""Transient objects of all connections, of which the TPM holds a few at a time.

An object keeps its slot until somebody needs it. One that cannot change is saved once in its life;
a sequence is saved at each eviction, and its saved copy is void when it is loaded: loading an older
one would silently resume an older state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from vtpm_cuse.errors import TpmError
from vtpm_cuse.resmgr.refusal import Dead, Refusal
from vtpm_cuse.resmgr.saved import SavedObject
from vtpm_cuse.wire.tpm import TpmRc

if TYPE_CHECKING:
    from collections.abc import Collection

    from vtpm_cuse.resmgr.inner import Inner

NO_ROOM: Final = frozenset(
    {TpmRc.TPM_RC_OBJECT_MEMORY, TpmRc.TPM_RC_MEMORY, TpmRc.TPM_RC_OBJECT_HANDLES}
)


@dataclass(slots=True, eq=False)
class Object:
    """A transient object.

    Attributes:
        owner: Number of the connection it belongs to.
        handle: What that connection calls it.
        changes: A sequence, whose saved copy is void after each use.
        physical: The TPM's handle while it is loaded.
        context: Its saved copy, while there is a valid one.
        used: When it was last used, in the manager's count of commands.
    """

    owner: int
    handle: int
    changes: bool
    physical: int | None
    context: bytes | None = None
    used: int = 0

    def suspend(self) -> SavedObject:
        """All but the owner, as plain values in the order of its arguments."""
        return SavedObject(self.handle, self.changes, self.physical, self.context, self.used)


class Objects:
    """Those of one TPM, which surely holds *slots* at a time."""

    def __init__(self, inner: Inner, slots: int) -> None:
        self._inner = inner
        self.slots = slots
        self._loaded: dict[int, Object] = {}
        self.evictions = 0

    def add(self, found: Object) -> None:
        """Takes an object that has just been loaded as a client wished."""
        assert found.physical is not None  # noqa: S101
        self._take_slot(found, found.physical)

    def resume(self, found: Object) -> None:
        """Takes an object that was there when the manager was suspended."""
        if found.physical is not None:
            self._loaded[found.physical] = found

    def _take_slot(self, found: Object, physical: int) -> None:
        # Whoever had this number has lost it without a word, by somebody's Clear, say.
        if self._loaded.get(physical) is not found:
            self.lose_number(physical)
        found.physical = physical
        self._loaded[physical] = found

    def remove(self, found: Object) -> None:
        """The TPM, or its owner, has ended it."""
        self.lose(found)
        found.context = None

    def lose(self, found: Object) -> None:
        """It is not loaded any more, by nobody's doing here; a saved copy is still good."""
        if found.physical is not None:
            self._loaded.pop(found.physical, None)
            found.physical = None

    def lose_number(self, physical: int) -> None:
        """`lose` of the one that is loaded there, if there is one."""
        if (found := self._loaded.get(physical)) is not None:
            self.lose(found)

    def flush(self, found: Object) -> None:
        """Ends it. Raises TpmError."""
        physical = found.physical
        self.remove(found)
        if physical is not None:
            self._inner.flush(physical)

    def make_room(self, count: int, keep: Collection[Object]) -> None:
        """So that *count* more can be loaded, if that can be. Raises Refusal."""
        while len(self._loaded) + count > self.slots and self.evict(keep):
            pass

    def evict(self, keep: Collection[Object]) -> bool:
        """Takes one that is not in *keep* out of the TPM; False if there is none. Raises Refusal."""
        candidates = [found for found in self._loaded.values() if found not in keep]
        if not candidates:
            return False
        # First from whom has most, or one greedy client evicts all others at each turn.
        owners = [found.owner for found in self._loaded.values()]
        victim = min(candidates, key=lambda found: (-owners.count(found.owner), found.used))
        assert victim.physical is not None  # noqa: S101
        try:
            if victim.context is None:
                victim.context = self._inner.save(victim.physical)
            self._inner.flush(victim.physical)
        except TpmError as exc:
            if exc.code not in _GONE:
                raise Refusal(
                    exc.code
                ) from exc  # else a saved copy, if there is one, is still good
        del self._loaded[victim.physical]
        victim.physical = None
        self.evictions += 1
        return True

    def evict_all(self) -> None:
        """Takes all out of the TPM. Raises Refusal."""
        while self.evict(()):
            pass

    def swap_in(self, found: Object) -> int:
        """`load` of the one object that a command uses, in room that is made. Raises as that."""
        keep = (found,)
        self.make_room(1, keep)
        return self.load(found, keep)

    def load(self, found: Object, keep: Collection[Object]) -> int:
        """The TPM's handle of an object, which is loaded if need be.

        Raises:
            Dead: It has ended.
            Refusal: It cannot be loaded now.
        """
        if found.physical is not None:
            return found.physical
        if found.context is None:
            raise Dead
        while True:
            try:
                physical = self._inner.load(found.context)
            except TpmError as exc:
                if exc.code in NO_ROOM and self.evict(keep):
                    continue
                if exc.code == TpmRc.TPM_RC_INTEGRITY_P1:
                    found.context = None
                if exc.code in _NOT_NOW:
                    raise Dead from exc
                raise Refusal(exc.code) from exc
            break
        if found.changes:
            found.context = None
        self._take_slot(found, physical)
        return physical


_GONE: Final = frozenset({TpmRc.TPM_RC_REFERENCE_H0, 0x184, 0x1C4, TpmRc.TPM_RC_HANDLE_P1})
_NOT_NOW: Final = frozenset({TpmRc.TPM_RC_INTEGRITY_P1, 0x1C5})
"""Void for good, or as long as its hierarchy is off."""
