"""The two things in a volatile state of libtpms that concern others; all else is opaque.

When it was taken: a TPM that resumes takes for the time that it has slept what CLOCK_REALTIME has
gone on since then. That time is somewhere in it, in milliseconds, 64 bits, big endian.

Which session is the exclusive audit session: that is in the head of a TPM 2.0's.

The end is the SHA-1 digest of what comes before. (libtpms, VolatileState_Marshal.)
"""

import hashlib
from typing import Final

from vtpm_cuse.errors import WireError
from vtpm_cuse.wire.layout import BIG, U16, U32, WireStruct, wire
from vtpm_cuse.wire.tpm2_handles import SESSIONS, UNKNOWN_SESSION, kind_of

_DIGEST_SIZE: Final = 20
_SEARCHED_MAX: Final = 1000
_MAGIC: Final = 0x45637889
_TPM_RH_UNASSIGNED: Final = 0x4000_0008


@wire()
class VolatileHead(WireStruct):
    """Head of a TPM 2.0's volatile state, VOLATILE_STATE, 12 bytes."""

    version: U16
    magic: U32
    min_version: U16
    exclusive_audit_session: U32


def time_in(state: bytes, earliest: int, latest: int) -> int | None:
    """When it was taken, in milliseconds since 1970; None where that cannot be found."""
    times = range(earliest, min(latest, earliest + _SEARCHED_MAX) + 1)
    found = [time for time in times for _ in range(state.count(_packed(time)))]
    return found[0] if len(found) == 1 else None


def with_time(state: bytes, taken: int, instead: int) -> bytes:
    """A state that was *taken* then, as if it had been at another time."""
    return _ended(state[:-_DIGEST_SIZE].replace(_packed(taken), _packed(instead)))


def exclusive_session_in(state: bytes) -> int:
    """The exclusive audit session; 0 for none, `UNKNOWN_SESSION` where that cannot be found."""
    try:
        head = VolatileHead.unpack_untrusted(state, BIG)
    except WireError:
        return UNKNOWN_SESSION
    session = head.exclusive_audit_session
    if head.magic == _MAGIC and session in {0, _TPM_RH_UNASSIGNED}:  # 0 before TPM2_Startup
        return 0
    is_one = head.magic == _MAGIC and kind_of(session) in SESSIONS
    return session if is_one else UNKNOWN_SESSION


def with_exclusive_session(state: bytes, session: int) -> bytes:
    """The state, in which `exclusive_session_in` finds one or none, with this one."""
    head = VolatileHead.unpack_untrusted(state, BIG)
    head = VolatileHead(head.version, head.magic, head.min_version, session)
    return _ended(head.pack(BIG) + state[VolatileHead.SIZE : -_DIGEST_SIZE])


def _packed(time: int) -> bytes:
    return time.to_bytes(8, "big")


def _ended(body: bytes) -> bytes:
    return body + hashlib.sha1(body, usedforsecurity=False).digest()
