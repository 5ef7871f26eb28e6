"""Where state lives: stores keep blobs, `sealed` turns them into payloads and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vtpm_cuse.errors import UsageError

if TYPE_CHECKING:
    from vtpm_cuse.storage.base import StateStore


def open_store(uri: str, *, tpm2: bool, mode: int | None = None, lock: bool = True) -> StateStore:
    """The store that a backend URI names; nothing is created or read yet.

    Raises:
        UsageError: The scheme is unknown.
    """
    scheme, separator, path = uri.partition("://")
    if scheme == "dir" and separator and path:
        from vtpm_cuse.storage.directory import DirectoryStore

        return DirectoryStore(path, tpm2=tpm2, mode=mode, lock=lock)
    raise UsageError(
        f"Unsupported backend '{uri}'", hint="use dir:///path/of/a/directory as backend URI"
    )
