"""The one thing in a volatile state of libtpms that concerns others: when it was taken.

A TPM that resumes takes for the time that it has slept what CLOCK_REALTIME has gone on since then.
That time is somewhere in the state, in milliseconds, 64 bits, big endian; all else is opaque, and
the end is the SHA-1 digest of what comes before. (libtpms, VolatileState_Marshal.)
"""

from __future__ import annotations

import hashlib
from typing import Final

_DIGEST_SIZE: Final = 20
_SEARCHED_MAX: Final = 1000


def time_in(state: bytes, earliest: int, latest: int) -> int | None:
    """When it was taken, in milliseconds since 1970; None where that cannot be found."""
    times = range(earliest, min(latest, earliest + _SEARCHED_MAX) + 1)
    found = [time for time in times for _ in range(state.count(_packed(time)))]
    return found[0] if len(found) == 1 else None


def with_time(state: bytes, taken: int, instead: int) -> bytes:
    """A state that was *taken* then, as if it had been at another time."""
    body = state[:-_DIGEST_SIZE].replace(_packed(taken), _packed(instead))
    return body + hashlib.sha1(body, usedforsecurity=False).digest()


def _packed(time: int) -> bytes:
    return time.to_bytes(8, "big")
