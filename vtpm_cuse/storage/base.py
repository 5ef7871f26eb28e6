"""What a store does. Stores are plain synchronous code: the engine calls them back."""

from __future__ import annotations

from typing import Final, Protocol

BLOB_NAMES: Final = ("permall", "volatilestate", "savestate")


class StateStore(Protocol):
    """Keeps blobs, header and all, by name (one of `BLOB_NAMES`)."""

    def load(self, name: str) -> bytes:
        """Returns the blob. Raises StateMissing only when there is none, else StorageError."""

    def store(self, name: str, blob: bytes) -> None:
        """Replaces the blob: afterwards, or after a crash, the old or the new one is there whole.

        Raises:
            StorageError: The old blob is still there, or at worst the new one, whole.
        """

    def delete(self, name: str, *, must_exist: bool = False) -> None:
        """Removes the blob. Raises StateMissing, StorageError."""

    def lock(self) -> None:
        """Keeps other processes off this state until `unlock` or `close`; again is harmless.

        Raises:
            StateLocked: Another process holds it.
            StorageError: The lock could not be tried.
        """

    def unlock(self) -> None:
        """Lets other processes at the state."""

    def sizes(self) -> dict[str, int]:
        """Bytes of each blob that exists, in the order of `BLOB_NAMES`. Raises StorageError."""

    def close(self) -> None:
        """Gives up lock and descriptors."""
