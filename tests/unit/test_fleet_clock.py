"""The time of a TPM that sleeps while the host's clock is set, on the real library."""

from __future__ import annotations

import struct
from typing import Final

import pytest

from tests.support import commands as tpm
from tests.support.processes import in_child
from tests.support.suspension import Host, prepared
from vtpm_cuse.errors import TpmUnavailable
from vtpm_cuse.fleet.worker import clock
from vtpm_cuse.fleet.worker.clock import Moment
from vtpm_cuse.wire.volatile import with_time

HOUR: Final = 3_600_000
"""Milliseconds: longer than a test takes on any machine."""
BILLION: Final = 1_000_000_000


def time_of(host: Host) -> int:
    """Milliseconds since it was powered on, by TPM2_ReadClock."""
    answer = host.vtpm.process(tpm.TPM2_READ_CLOCK)
    assert tpm.code_of(answer) == 0
    (found,) = struct.unpack_from(">Q", answer, 10)
    return int(found)


@pytest.mark.parametrize("step", [0, HOUR, -HOUR], ids=["no step", "forwards", "backwards"])
@pytest.mark.parametrize("slept", [0, 7 * HOUR], ids=["short", "long"])
@in_child
def test_a_step_of_the_clock_is_no_time(step: int, slept: int) -> None:
    """As if it had slept for so long, and the host's clock had been set by so much meanwhile."""
    host = Host(prepared())
    host.vtpm.start()
    host.vtpm.process(tpm.TPM2_STARTUP_CLEAR)
    before = time_of(host)
    begin = clock.now()
    saved = host.vtpm.suspend()
    since = clock.asleep_since(saved.volatile, begin)
    then = Moment(since.realtime - slept - step, since.boottime - slept * 1_000_000)
    volatile = with_time(saved.volatile, since.realtime, then.realtime)
    host.vtpm = host._make()
    host.vtpm.resume(saved._replace(volatile=clock.awake(volatile, then)))
    assert slept <= time_of(host) - before < slept + HOUR


@in_child
def test_no_time_has_passed_for_one_that_nobody_has_used() -> None:
    host = Host(prepared())
    host.vtpm.start()
    host.vtpm.process(tpm.TPM2_STARTUP_CLEAR)
    begin = clock.now()
    saved = host.vtpm.suspend()
    since = clock.asleep_since(saved.volatile, begin)
    then = since._replace(realtime=since.realtime - 7 * HOUR)
    volatile = with_time(saved.volatile, since.realtime, then.realtime)
    host.vtpm = host._make()
    host.vtpm.resume(saved._replace(volatile=clock.as_new(volatile, then)))
    assert time_of(host) < HOUR
    assert clock.as_new(b"opaque", then) == b"opaque"


def test_where_the_state_has_no_time_a_step_forwards_is_no_wake() -> None:
    begin = clock.now()
    since = clock.asleep_since(b"opaque", begin)
    assert clock.awake(b"opaque", since) == b"opaque"
    assert clock.awake(b"opaque", since._replace(realtime=since.realtime + HOUR)) == b"opaque"
    with pytest.raises(TpmUnavailable, match="clock was set"):
        clock.awake(b"opaque", since._replace(realtime=since.realtime - HOUR))
    assert clock.awake(b"", since._replace(realtime=0)) == b""  # one that is off
