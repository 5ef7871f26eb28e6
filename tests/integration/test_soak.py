"""Hostile load for seconds; `bench/soak.py` does the same for as long as wanted."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support import sockets as s
from tests.support.soak import COMMANDS, SocketTarget, held, soak

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator
    from pathlib import Path

FAULTS = ("garbage", "half", "unread", "control", "control garbage", "reset")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[s.Server]:
    with s.Server(tmp_path, *s.RUNNING) as server:
        assert server.request(s.GET_CONFIG, size=8)  # it is there, with all it opens
        yield server
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0


def test_nothing_grows(server: s.Server) -> None:
    target = SocketTarget(server)
    assert sorted(target.faults) == sorted(FAULTS)
    figures = list(soak(target, 20_000, 1_000, seed=7))
    first, last = figures[2], figures[-1]
    server.settle(int(figures[0]["descriptors"]) + 1)
    assert last["resident_kib"] - first["resident_kib"] < 1024


@given(st.lists(st.sampled_from(("burst", *FAULTS)), max_size=6), st.randoms(use_true_random=False))
@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_mix(server: s.Server, mix: list[str], chance: random.Random) -> None:
    """One server lives through all of them."""
    target = SocketTarget(server)
    before, _ = held(target.pid)
    for what in mix:
        if what == "burst":
            target.burst(chance.choices(COMMANDS, k=5))
        else:
            target.faults[what](chance)
    target.burst([COMMANDS[0]])
    server.settle(before + 1)
