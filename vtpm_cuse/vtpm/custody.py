"""Whose a vTPM's state is: locked by this process, on its way from another host, or to one.

`TRANSITIONS` is all that can happen to it. A state that is *away* may be another process' by now:
nothing of it is written, and no command is executed, before it is locked.
"""

from __future__ import annotations

import logging
import time
from enum import Enum
from typing import TYPE_CHECKING, Final

from vtpm_cuse.errors import PtmError, StateLocked, StorageError
from vtpm_cuse.wire.ptm import PtmResult

if TYPE_CHECKING:
    from vtpm_cuse.storage.base import StateStore

log = logging.getLogger(__name__)

LOCK_RETRY_SECONDS: Final = 0.01
"""Between two tries, as in the C suite: the number of tries that a client asks for counts in these."""

LOCK_WAIT_MAX_SECONDS: Final = 60
"""Whoever asks for more waits for what will not come.

PEER: tries as often as it is told to, which can be for years.
"""

TAKE_BACK_SECONDS: Final = 3
"""As in the C suite: the destination of a migration that came to nothing gives the lock back."""


class Whose(Enum):
    """Whose the state is."""

    OURS_TO_LOCK = "ours to lock"
    """Nobody's yet: the first start locks it."""

    HELD = "held"
    """This process has it locked."""

    INCOMING = "incoming"
    """A migration brings it: its owner still has it locked, so a start only looks at it."""

    HANDED_OUT = "handed out"
    """The destination of a migration may lock it; the next command takes it back."""

    LOST = "lost"
    """Another process has it: this one is to end, without a word to any client."""


class Step(Enum):
    """What happens to it."""

    LOCK = "locked"
    HAND_OUT = "handed out"
    MISS = "missed"
    """A command needed it, and another process has it locked."""


TRANSITIONS: Final = {
    (Whose.OURS_TO_LOCK, Step.LOCK): Whose.HELD,
    # A start looks its path up again, and may have to lock what is there now.
    (Whose.HELD, Step.LOCK): Whose.HELD,
    (Whose.HELD, Step.HAND_OUT): Whose.HANDED_OUT,
    # The first command, or the blobs that came in.
    (Whose.INCOMING, Step.LOCK): Whose.HELD,
    (Whose.INCOMING, Step.MISS): Whose.LOST,
    (Whose.INCOMING, Step.HAND_OUT): Whose.HANDED_OUT,
    (Whose.HANDED_OUT, Step.LOCK): Whose.HELD,
    (Whose.HANDED_OUT, Step.MISS): Whose.LOST,
    # The last blob of a migration may be asked for again.
    (Whose.HANDED_OUT, Step.HAND_OUT): Whose.HANDED_OUT,
    # Where nobody has ended it, a device: the other process may give it back.
    (Whose.LOST, Step.LOCK): Whose.HELD,
    (Whose.LOST, Step.MISS): Whose.LOST,
    (Whose.LOST, Step.HAND_OUT): Whose.LOST,
}
"""What is not here cannot happen: a state that nobody has locked is not handed out, and one that
this process holds is not missed."""

_AWAY: Final = frozenset({Whose.INCOMING, Whose.HANDED_OUT, Whose.LOST})
_TAKE_BACK_RETRIES: Final = {
    Whose.HANDED_OUT: round(TAKE_BACK_SECONDS / LOCK_RETRY_SECONDS),
    Whose.LOST: round(TAKE_BACK_SECONDS / LOCK_RETRY_SECONDS),
}
"""Of what was never locked here, nobody is expected to give the lock back."""

_RETRIES_MAX: Final = round(LOCK_WAIT_MAX_SECONDS / LOCK_RETRY_SECONDS)


class Custody:
    """Of the state in *blobs*; of nothing at all where there is no store.

    Attributes:
        whose: Whose the state is.
        away: Whether it may be another process'.
    """

    def __init__(self, blobs: StateStore | None, *, incoming: bool) -> None:
        self._blobs = blobs
        self._aborted = False
        self._become(Whose.INCOMING if incoming else Whose.OURS_TO_LOCK)

    def _become(self, whose: Whose) -> None:
        self.whose = whose
        self.away = whose in _AWAY  # every command asks

    def go(self, step: Step) -> None:
        """The one way from one to another."""
        found = TRANSITIONS.get((self.whose, step))
        if found is None:
            raise RuntimeError(f"a state that is {self.whose.value} cannot be {step.value}")
        self._become(found)

    def lock(self, retries: int | None = None) -> None:
        """Locks the state, trying again every 10 ms, for a minute at most. Blocks.

        Without *retries* it waits as long as somebody may be about to give the lock back.

        Raises:
            StorageError: It could not be locked.
        """
        if retries is None:
            retries = _TAKE_BACK_RETRIES.get(self.whose, 0)
        retries = min(retries, _RETRIES_MAX)
        if self._blobs is not None:
            while True:
                try:
                    self._blobs.lock()
                    break
                except StateLocked:
                    if retries == 0 or self._aborted:
                        raise
                retries -= 1
                time.sleep(LOCK_RETRY_SECONDS)
        self.go(Step.LOCK)

    def take_back(self) -> bool:
        """Before a command, of a state that is away; says whether it is ours again."""
        try:
            self.lock()
        except StorageError as exc:
            log.error("%s", exc)
            self.go(Step.MISS)
            return False
        return True

    def need(self) -> None:
        """Before anything but a command that writes state: one try. Raises PtmError."""
        if self.away:
            try:
                self.lock(0)
            except StorageError as exc:
                raise PtmError(PtmResult.TPM_FAIL, str(exc)) from exc

    def hand_out(self) -> None:
        """Lets the destination of a migration lock the state."""
        if self._blobs is not None:
            self.go(Step.HAND_OUT)
            self._blobs.unlock()

    def abort(self) -> None:
        """No lock is waited for any more. From any thread."""
        self._aborted = True

    def suspend(self) -> str:
        """Whose the state is, as a plain value; what was locked stays so."""
        return self.whose.value

    def resume(self, saved: str) -> None:
        """As it was suspended; what was held is locked.

        Raises:
            StorageError: It cannot be, now.
        """
        whose = Whose(saved)
        if whose is Whose.HELD:
            self.lock(0)
        else:
            self._become(whose)
