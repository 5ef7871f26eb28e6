"""Descriptors kept for the state."""

from __future__ import annotations

import errno
import gc
import os

import pytest

from vtpm_cuse.errors import StorageError
from vtpm_cuse.storage.reserve import Reserve


def test_it_closes_what_it_held() -> None:
    gc.collect()  # what earlier tests have left may hold some
    before = sorted(os.listdir("/proc/self/fd"))
    reserve = Reserve()
    assert len(os.listdir("/proc/self/fd")) > len(before)
    del reserve
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_without_one_nothing_is_held_and_nothing_done_twice() -> None:
    gc.collect()  # what earlier tests have left may hold some
    before = sorted(os.listdir("/proc/self/fd"))
    reserve, tries = Reserve(0), []

    def work() -> None:
        tries.append(1)
        raise StorageError("state", "no room") from OSError(errno.EMFILE, "")

    with pytest.raises(StorageError):
        reserve.help(work)
    assert (len(tries), sorted(os.listdir("/proc/self/fd"))) == (1, before)
