"""A worker's store: what libtpms stores goes to the manager, and is durable when that answers.

Meanwhile the worker waits in libtpms' callback, so no response leaves before.
"""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING, Protocol

from vtpm_cuse.errors import StorageError
from vtpm_cuse.fleet.messages import Answer, Call, Message, failure
from vtpm_cuse.storage.base import BLOB_NAMES, PERMANENT, WithoutBackup

if TYPE_CHECKING:
    from collections.abc import Mapping


class Managers(Protocol):
    """Who has the state."""

    def ask(self, message: Message) -> Message | None:
        """The answer; None when there is nobody any more."""


class MessageStore(WithoutBackup):
    """Implements `storage.base.StateStore`; the lock is the manager's, who has it at the start.

    Args:
        managers: One after the other.
        permanent: The permanent state of now, if it came along; `forget` ends that.
    """

    def __init__(self, managers: Managers, permanent: bytes = b"") -> None:
        self._managers = managers
        self._permanent = permanent
        self._turn = threading.Lock()
        self._locked = True
        self._closed = False

    def load(self, name: str) -> bytes:
        """Returns the blob."""
        if self._permanent and name == PERMANENT:
            return self._permanent
        return self._ask(Call.LOAD, name)

    def store(self, name: str, blob: bytes) -> None:
        """Replaces the blob, durably."""
        self.forget()
        self._ask(Call.STORE, name, blob)

    def forget(self) -> None:
        """The TPM is on: from now on what it wants is asked for, for it may be another's by then."""
        self._permanent = b""

    def delete(self, name: str, *, must_exist: bool = False) -> None:
        """Removes the blob."""
        self._ask(Call.DELETE, name, flags=must_exist)

    def replace_all(self, blobs: Mapping[str, bytes]) -> None:
        """Nobody replaces a TPM who serves it."""
        raise StorageError("the state", "a worker does not replace it")

    def refresh(self) -> None:
        """The manager's folder is the one that it opened."""

    def lock(self) -> None:
        """As the manager says, after an `unlock`."""
        if not self._locked:
            self._ask(Call.LOCK)
            self._locked = True

    def unlock(self) -> None:
        """Another host may have the state."""
        self._ask(Call.UNLOCK)
        self._locked = False

    def sizes(self) -> dict[str, int]:
        """Bytes of each blob."""
        found: dict[str, int] = json.loads(self._ask(Call.SIZES))
        return found

    def remains(self) -> str:
        """What is left without a permanent state."""
        return self._ask(Call.REMAINS).decode()

    def where(self, name: str) -> str:
        """Just the name: a worker knows no path."""
        return name

    def remedy(self, _name: str) -> str:
        """What a manager has."""
        return "nothing was changed; restore a snapshot of the TPM, or put back a copy of its state"

    def has_room(self, descriptors: int) -> bool:
        """Whether the manager can take so many of them: what it cannot would be closed on its way."""
        try:
            self._ask(Call.ROOM, number=descriptors)
        except StorageError:
            return False
        return True

    def close(self) -> None:
        """The TPM is off, in order; again is harmless."""
        if not self._closed:
            self._closed = True
            self._ask(Call.CLOSE)

    def _ask(
        self, call: Call, name: str = "", body: bytes = b"", flags: int = 0, number: int = 0
    ) -> bytes:
        number = BLOB_NAMES.index(name) if name else number
        with self._turn:
            answer = self._managers.ask(Message(call, body, flags, number))
        if answer is None:
            raise StorageError(name or "the state", "the manager has ended")
        if answer.kind is Answer.DONE:
            return answer.body
        raise failure(answer.body)
