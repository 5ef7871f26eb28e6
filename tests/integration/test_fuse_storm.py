"""The storm of tests/kernel/test_wire_fuzz.py on a FUSE mount, which needs no kernel lab."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.kernel.harness import servers
from tests.kernel.test_wire_fuzz import weather
from tests.support.fuse import FuseServer, needs_fuse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.kernel.harness import Server


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    needs_fuse()
    yield from servers(tmp_path, FuseServer)


def test_mounted_device_under_a_storm(serve: Callable[..., Server]) -> None:
    weather(serve("vtpmstorm").start())
