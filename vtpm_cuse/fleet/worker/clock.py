"""How long a TPM has slept, by a clock that nobody can set.

Its own clock, and how long it keeps out who has guessed wrongly, go on while it sleeps. libtpms asks
CLOCK_REALTIME for that; who sets the host's time would shorten the one and move the other.
"""

from __future__ import annotations

import time
from typing import Final, NamedTuple

from vtpm_cuse.errors import TpmUnavailable
from vtpm_cuse.wire.ptm import PtmResult
from vtpm_cuse.wire.volatile import time_in, with_time

_MILLION: Final = 1_000_000
_TOLERANCE: Final = 1000


class Moment(NamedTuple):
    """One moment, as two clocks have it.

    Attributes:
        realtime: Milliseconds since 1970, by the host's time of day.
        boottime: Nanoseconds since the host was booted, with those in which it was suspended.
    """

    realtime: int
    boottime: int


def now() -> Moment:
    """This one."""
    boottime = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    return Moment(time.time_ns() // _MILLION, boottime)


def asleep_since(volatile: bytes, begin: Moment) -> Moment:
    """When this state was taken: after *begin*, and by now."""
    end = now()
    taken = time_in(volatile, begin.realtime, end.realtime)
    return Moment(begin.realtime if taken is None else taken, end.boottime)


def awake(volatile: bytes, since: Moment) -> bytes:
    """The state with which libtpms finds that so much time has passed as has, to be used at once.

    Raises:
        TpmUnavailable: That cannot be told to it, and it would find more.
    """
    realtime, boottime = now()
    instead = max(realtime - (boottime - since.boottime) // _MILLION, 0)
    if time_in(volatile, since.realtime, since.realtime) is not None:
        return with_time(volatile, since.realtime, instead)
    if volatile and instead - since.realtime > _TOLERANCE:
        reason = "the host's clock was set while it slept, which this libtpms takes for time"
        raise TpmUnavailable(PtmResult.TPM_FAIL, reason)
    return volatile


def as_new(volatile: bytes, since: Moment) -> bytes:
    """The state of one that nobody has used, for which no time has passed, to be used at once.

    Where libtpms cannot be told so, its clock has run on meanwhile.
    """
    if time_in(volatile, since.realtime, since.realtime) is None:
        return volatile
    return with_time(volatile, since.realtime, now().realtime)
