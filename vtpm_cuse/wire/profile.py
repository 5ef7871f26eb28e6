"""A TPM 2.0's profile, which libtpms 0.10 and later write at the head of its permanent state.

By hand and not by json: who looks may be in a sandbox, in which nothing more can be imported.
Source: states that libtpms has written, and the profile's text as `TPMLIB_GetInfo` gives it.
"""

import re
from typing import Final, NamedTuple

from vtpm_cuse.errors import WireError
from vtpm_cuse.wire.layout import BIG, U16, U32, WireStruct, wire

_MAGIC: Final = 0xAB364723
_WITH_PROFILE: Final = 4
_NAME: Final = re.compile(rb'"Name":"([^"\\]{1,64})"')
_LEVEL: Final = re.compile(rb'"StateFormatLevel":(\d{1,9})\b')

STATE_LEVELS: Final = {(0, 10): 7, (0, 11): 8}
"""Version of libtpms, and the highest StateFormatLevel that it reads and writes."""


@wire()
class PersistentAllHead(WireStruct):
    """Head of the permanent state, PERSISTENT_ALL, 10 bytes; from version 4 on a profile follows."""

    version: U16
    magic: U32
    min_version: U16
    profile_size: U16


class StoredProfile(NamedTuple):
    """Its name, and the level of the state's format, which its commands and algorithms need."""

    name: str
    level: int

    def is_for(self, version: tuple[int, ...]) -> bool:
        """Whether a libtpms of that *version* reads such a state, as far as is known."""
        oldest = _oldest(self.level)
        return oldest is not None and oldest <= version


def oldest_library(level: int) -> str:
    """Which libtpms one has to have at least, for a StateFormatLevel above the lowest, in words."""
    oldest = _oldest(level)
    return f"libtpms {oldest[0]}.{oldest[1]} or newer" if oldest else "a newer libtpms"


def _oldest(level: int) -> tuple[int, int] | None:
    return next((version for version, highest in STATE_LEVELS.items() if highest >= level), None)


def stored_profile_untrusted(payload: bytes) -> StoredProfile | None:
    """What the permanent state of a TPM 2.0 says; None if it says nothing of a profile."""
    try:
        head = PersistentAllHead.unpack_untrusted(payload, BIG)
    except WireError:
        return None
    if head.magic != _MAGIC or head.version < _WITH_PROFILE:
        return None
    text = payload[head.SIZE : head.SIZE + head.profile_size]
    name, level = _NAME.search(text), _LEVEL.search(text)
    if name is None or level is None:
        return None
    return StoredProfile(name[1].decode(errors="replace"), int(level[1]))
