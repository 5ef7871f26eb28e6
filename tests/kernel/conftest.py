"""Servers on real devices. Outside the kernel lab these tests are skipped, see kernel-helpers/lab."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

import pytest

from tests.kernel.harness import STARTED, Server, errno_from, needs, servers

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from pathlib import Path

    Serve = Callable[..., Server]


@pytest.fixture(scope="session")
def cuse() -> None:
    """A kernel with /dev/cuse, and the right to use it."""
    error = errno_from(lambda: os.close(os.open("/dev/cuse", os.O_RDWR)))
    reason = os.strerror(error) if error else ""
    needs(not error, f"/dev/cuse: {reason}; run kernel-helpers/lab -- ... or modprobe cuse as root")


@pytest.fixture(autouse=True)
def _children_are_heard() -> Iterator[None]:
    """A server that makes a device of the kernel's ignores how its children end; tests must not."""
    yield
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


@pytest.fixture
def serve(cuse: None, tmp_path: Path) -> Iterator[Serve]:
    """Makes servers (not started yet) that end with the test."""
    yield from servers(tmp_path)


@pytest.fixture(scope="module")
def module_serve(cuse: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """Makes servers (not started yet) that end with the module."""
    yield from servers(tmp_path_factory.mktemp("servers"))


_LOG_TAIL = 4000


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, None]:
    """Shows the logs of running and just ended servers with a failed test."""
    outcome = yield
    report = outcome.get_result()
    if not report.failed:
        return
    for server in STARTED[-4:]:
        if server.log.exists():
            report.sections.append((f"log of {server.name}", server.said[-_LOG_TAIL:]))
