"""The place that a TPM is set up for: looked at first, written once at the end.

Until `Target.replace` nothing of an earlier TPM is touched. It is the store's one
step: a crash leaves the earlier TPM, at worst as after a power cut, or the new
one, never that with a stranger's volatile state.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from vtpm_cuse.errors import UsageError
from vtpm_cuse.storage.base import PERMANENT, left_over, load_all
from vtpm_cuse.storage.locations import parse
from vtpm_cuse.storage.stores import open_store

if TYPE_CHECKING:
    from vtpm_cuse.storage.base import StateStore


def check_access(uri: str, user: str) -> None:
    """Whether *user*, who runs this, can put a state there. Raises UsageError."""
    where = parse(uri)
    if where.scheme == "file" and os.path.exists(where.path):
        if not os.access(where.path, os.R_OK | os.W_OK, effective_ids=True):
            raise UsageError(f"User {user} cannot read/write {where.path}.")
        return
    check_directory(where.folder, user)


def check_directory(path: str, user: str) -> None:
    """Whether *user*, who runs this, can make files there. Raises UsageError."""
    if not os.path.isdir(path) or not os.access(path, os.X_OK, effective_ids=True):
        raise UsageError(
            f"User {user} cannot access directory {path}. Make sure it exists and is a directory."
        )
    for right, mode in (("read", os.R_OK), ("write", os.W_OK)):
        if not os.access(path, mode, effective_ids=True):
            raise UsageError(f"Need {right} rights on directory {path} for user {user}.")


class Target:
    """Where the state of the TPM goes. Every call raises StorageError."""

    def __init__(self, uri: str, *, tpm2: bool) -> None:
        self._store: StateStore = open_store(uri, tpm2=tpm2)
        where = parse(uri)
        self._file = where.path if where.scheme == "file" else ""
        self._made = False

    def has_state(self) -> bool:
        """Whether a TPM is there. Raises StorageError also where only a part of one is left."""
        if left := self._store.remains():
            raise left_over(self._store, left)
        return PERMANENT in self._store.sizes()

    def lock(self) -> None:
        """Keeps every other process off the state. Raises StateLocked."""
        missing = bool(self._file) and not os.path.lexists(self._file)
        self._store.lock()
        self._made = missing and not self._store.sizes()

    def blobs(self) -> dict[str, bytes]:
        """All that is there."""
        return load_all(self._store)

    def replace(self, made: dict[str, bytes]) -> None:
        """Puts another TPM in the place of the one that is there, if one is."""
        self._store.replace_all(made)
        self._made = False

    def update(self, before: dict[str, bytes], after: dict[str, bytes]) -> None:
        """Writes what was changed of the TPM that is there."""
        changed = {name: blob for name, blob in after.items() if before.get(name) != blob}
        if PERMANENT in changed:
            self._store.store(PERMANENT, changed.pop(PERMANENT))
        for name, blob in changed.items():
            self._store.store(name, blob)
        for name in before.keys() - after.keys():
            self._store.delete(name)

    def close(self) -> None:
        """Gives up the lock; a file that a failed run has made goes first."""
        if self._made:
            with contextlib.suppress(OSError):
                os.unlink(self._file)
        self._store.close()
