"""Keys of stored state, in a process that keeps them from core dumps, debuggers and swap."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vtpm_cuse.config import KeySource
    from vtpm_cuse.storage.keys import Key


def open_key(source: KeySource) -> Key:
    """The key, ready for use: no file is needed for it any more.

    Raises:
        UsageError: It cannot be read, or is none.
    """
    # Imported here: who has no keys does without.
    from vtpm_cuse.service.confine import secrecy
    from vtpm_cuse.storage.keys import read_key

    secrecy.hide_process()  # before the key is in memory
    key = read_key(source)
    secrecy.keep_from_swap(key.secret)
    key.load_cipher()
    return key
