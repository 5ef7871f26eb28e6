"""State in memory: for tests, and for a TPM that nobody needs tomorrow."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vtpm_cuse.errors import StateMissing
from vtpm_cuse.storage.base import BLOB_NAMES, PERMANENT, WithoutBackup, left_over

if TYPE_CHECKING:
    from collections.abc import Mapping


class MemoryStore(WithoutBackup):
    """Implements `storage.base.StateStore`."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.locked = False

    def load(self, name: str) -> bytes:
        """Returns the blob. Raises StateMissing."""
        try:
            return self.blobs[name]
        except KeyError:
            if name == PERMANENT and (left := self.remains()):
                raise left_over(self, left) from None
            raise StateMissing(name, "no such state in memory") from None

    def store(self, name: str, blob: bytes) -> None:
        """Replaces the blob."""
        self.blobs[name] = blob

    def delete(self, name: str, *, must_exist: bool = False) -> None:
        """Removes the blob. Raises StateMissing."""
        if self.blobs.pop(name, None) is None and must_exist:
            raise StateMissing(name, "no such state in memory")

    def replace_all(self, blobs: Mapping[str, bytes]) -> None:
        """Makes *blobs* all there is."""
        self.blobs = dict(blobs)

    def refresh(self) -> None:
        """Memory has no path."""

    def lock(self) -> None:
        """Nobody else can reach this memory."""
        self.locked = True

    def unlock(self) -> None:
        """See `lock`."""
        self.locked = False

    def sizes(self) -> dict[str, int]:
        """Bytes of each blob."""
        return {name: len(self.blobs[name]) for name in BLOB_NAMES if name in self.blobs}

    def remains(self) -> str:
        """Another blob without the permanent one."""
        return "" if PERMANENT in self.blobs else next(iter(self.sizes()), "")

    def where(self, name: str) -> str:
        """Just the name."""
        return name

    def remedy(self, _name: str) -> str:
        """Somebody gave it, and may have another."""
        return "put back a copy that you kept"

    def close(self) -> None:
        """Nothing to give up."""
