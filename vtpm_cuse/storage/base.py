"""What a store does. Stores are plain synchronous code: the engine calls them back."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol

from vtpm_cuse.errors import StateMissing, StorageError

if TYPE_CHECKING:
    from collections.abc import Mapping

BLOB_NAMES: Final = ("permall", "volatilestate", "savestate")
PERMANENT: Final = BLOB_NAMES[0]
BACKUP_SUFFIX: Final = ".bak"
DEFAULT_MODE: Final = 0o640
OWNER_MODE: Final = 0o600
"""What the owner of a state file needs: a later start may have no capabilities to do without."""
LOCK_CONFLICT: Final = (errno.EAGAIN, errno.EACCES)

RunLater = Callable[[Callable[[], object]], None]
"""Takes a function and has it called in another thread: soon, or never when all ends."""


class StateStore(Protocol):
    """Keeps blobs, header and all, by name (one of `BLOB_NAMES`)."""

    def load(self, name: str) -> bytes:
        """Returns the blob.

        Raises:
            StateMissing: There is none; for the permanent state also: nor is there anything that
                is left of a TPM, so that a new one may begin.
            StorageError: Anything else.
        """

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

    def refresh(self) -> None:
        """Looks the path up again, before a start.

        What was there before is let go when it is there no more, and so is a lock on it.

        Raises:
            StorageError: What is there now cannot be looked at.
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

    def remains(self) -> str:
        """What is left of a TPM whose permanent state is missing; empty where nothing is.

        Raises:
            StorageError: It cannot be looked at.
        """

    def restore_backup(self) -> str:
        """Puts the backup in the place of a permanent state that is missing, if it is to.

        And ends what a crash left of `try_backup`: the state that was refused is back.

        Returns:
            What was put there; empty where nothing was.

        Raises:
            StorageError: It could not be; the backup is as it was.
        """

    def try_backup(self) -> str:
        """Puts the backup in the place of a permanent state that was refused, if it is to.

        Until `end_try` both are kept.

        Returns:
            What the refused one will be called; empty where nothing was done.

        Raises:
            StorageError: It could not be; both are still there.
        """

    def end_try(self, *, accepted: bool) -> None:
        """The refused state is the backup from now on, or all is as it was. Raises StorageError."""

    def where(self, name: str) -> str:
        """What keeps a blob, for messages; another text for each blob."""

    def remedy(self, name: str) -> str:
        """What can be done when a blob is damaged, as a clause of a message; may look for it."""

    def use_of_backup(self) -> str:
        """What can be done with a backup alone, as a clause of a message; may look for it."""

    def defer_to(self, run_later: RunLater) -> None:
        """From now on, *run_later* may be given what no answer has to wait for."""

    def close(self) -> None:
        """Gives up lock and descriptors."""


class WithoutBackup:
    """What stores are alike in that keep no backup and have nothing that could wait."""

    def restore_backup(self) -> str:
        """There is none."""
        return ""

    def try_backup(self) -> str:
        """There is none."""
        return ""

    def end_try(self, *, accepted: bool) -> None:
        """Nothing was tried."""

    def use_of_backup(self) -> str:
        """There is none."""
        return ""

    def defer_to(self, _run_later: RunLater) -> None:
        """Nothing takes long here."""


def load_all(store: StateStore) -> dict[str, bytes]:
    """All blobs that are there, by name. Raises StorageError."""
    found = {}
    for name in BLOB_NAMES:
        with contextlib.suppress(StateMissing):
            found[name] = store.load(name)
    return found


def left_over(store: StateStore, left: str) -> StorageError:
    """Why no TPM can begin where the permanent state is missing and *left* is there."""
    permanent = store.where(PERMANENT)
    if left.endswith(BACKUP_SUFFIX):
        cure = store.use_of_backup()
    elif PERMANENT in left:
        cure = "copy it there to start from it"
    else:
        cure = "put back the permanent state that it belongs to"
    return StorageError(
        permanent,
        f"is missing, but {left} of an earlier TPM is there, and no other TPM begins beside it; "
        f"{cure}; for a new TPM use another place",
    )


REPLACED: Final = (
    "it was replaced since this program started, and the sandbox lets nobody at what is there now; "
    "end the program and start it again, or put back what was there"
)

GONE: Final = "it is gone since this program started; put back what was there"
