"""Keys of stored state, in a process that keeps them from core dumps, debuggers and swap."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vtpm_cuse.errors import UsageError

if TYPE_CHECKING:
    from vtpm_cuse.config import KeySource, Secret
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
    return _ready(read_key(source))


def given_key(source: KeySource, secret: Secret | None) -> Key:
    """The same of one that has no place. Raises UsageError: it is not *given*, or is none."""
    from vtpm_cuse.storage.keys import CIPHER_KEY_SIZES, Key

    if secret is None:
        raise UsageError("is kept nowhere: give it at each start, with --key fd=N, say")
    if len(secret.value) != CIPHER_KEY_SIZES[source.mode]:
        raise UsageError(f"has {len(secret.value)} bytes, which is none of {source.mode}")
    return _ready(Key(secret.value))


def _ready(key: Key) -> Key:
    from vtpm_cuse.service.confine import secrecy

    secrecy.keep_from_swap(key.secret)
    key.load_cipher()
    return key


def check_source(source: KeySource) -> None:
    """Raises UsageError where it has a word that no key has."""
    from vtpm_cuse.storage.keys import CIPHER_KEY_SIZES, KDFS, KEY_FORMATS

    allowed = {"mode": CIPHER_KEY_SIZES, "format": KEY_FORMATS, "kdf": KDFS}
    for name, known in allowed.items():
        if getattr(source, name) not in known:
            raise UsageError(f"the {name} of a key is one of {', '.join(known)}")
