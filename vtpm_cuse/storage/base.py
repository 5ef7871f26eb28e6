"""What a store does. Stores are plain synchronous code: the engine calls them back."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

BLOB_NAMES: Final = ("permall", "volatilestate", "savestate")
DEFAULT_MODE: Final = 0o640
LOCK_CONFLICT: Final = (errno.EAGAIN, errno.EACCES)

Beside = Callable[[Callable[[], object]], None]
"""Takes a function and has it called in another thread: soon, or never when all ends."""


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

    def replace_all(self, blobs: Mapping[str, bytes]) -> None:
        """Makes *blobs* all there is, in one step: what a program does that prepares a TPM.

        Let the TPM run on a `SealedStore` around a `storage.memory.MemoryStore`, lock this store,
        and give it that one's ``blobs``, header and all, at the end. Afterwards, or after a crash,
        the old TPM or the new one is there; the old one at worst without its volatile and its
        saved state, as after a power cut.

        Raises:
            StorageError: As `store`.
        """

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

    def where(self, name: str) -> str:
        """What keeps a blob, for messages; another text for each blob."""

    def remedy(self, name: str) -> str:
        """What can be done when a blob is damaged, as a clause of a message; may look for it."""

    def work_beside(self, beside: Beside) -> None:
        """From now on, *beside* may be given what no answer has to wait for."""

    def close(self) -> None:
        """Gives up lock and descriptors."""


def write_all(write: Callable[[memoryview, int], int], data: bytes) -> None:
    """Calls *write* with what is left and how many bytes are done until nothing is left."""
    view, done = memoryview(data), 0
    while done < len(view):
        done += write(view[done:], done)
