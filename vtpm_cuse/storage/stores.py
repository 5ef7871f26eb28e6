"""The store that a URI of a state names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vtpm_cuse.errors import UsageError
from vtpm_cuse.storage import locations
from vtpm_cuse.storage.base import OWNER_MODE

if TYPE_CHECKING:
    from vtpm_cuse.storage.base import StateStore
    from vtpm_cuse.storage.directory import DirectoryStore


def open_store(
    uri: str,
    *,
    tpm2: bool,
    mode: int | None = None,
    lock: bool = True,
    fsync: bool = True,
    backup: bool = False,
) -> StateStore:
    """The store that a backend URI names; nothing is created or read yet.

    Raises:
        UsageError: The scheme is unknown, or cannot do what is asked for.
    """
    if mode is not None and mode & OWNER_MODE != OWNER_MODE:
        raise UsageError(
            f"The mode {mode:04o} would keep the TPM from its own state",
            hint="give its owner the rights to read and write, as with mode=0600",
        )
    where = locations.parse(uri)
    if backup and where.scheme in {"file", "mem"}:
        raise UsageError("backup is for states in a directory", hint="leave it out, or use dir")
    if where.scheme == "dir":
        from vtpm_cuse.storage.directory import DirectoryStore

        return DirectoryStore(
            where.path, tpm2=tpm2, mode=mode, lock=lock, fsync=fsync, backup=backup
        )
    if where.scheme == "file":
        from vtpm_cuse.storage.linear import LinearStore

        return LinearStore(where.path, mode=mode, lock=lock, fsync=fsync)
    if where.scheme == "mem":
        from vtpm_cuse.storage.memory import MemoryStore

        return MemoryStore()
    raise UsageError(
        f"Unsupported backend '{uri}'",
        hint="use dir:///path/of/a/directory, file:///path/of/a/file or mem:// as backend URI",
    )


def open_directory(path: str, *, fsync: bool = True) -> DirectoryStore:
    """A TPM 2.0 in a folder that is its owner's alone; nothing is created or read yet."""
    from vtpm_cuse.storage.directory import DirectoryStore

    return DirectoryStore(path, tpm2=True, mode=OWNER_MODE, fsync=fsync)
