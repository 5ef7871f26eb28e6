"""Descriptors kept for the state."""

from __future__ import annotations

import os

from vtpm_cuse.storage.reserve import Reserve


def test_it_closes_what_it_held() -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    reserve = Reserve()
    assert len(os.listdir("/proc/self/fd")) > len(before)
    del reserve
    assert sorted(os.listdir("/proc/self/fd")) == before
