"""The TPM's file in a FUSE mount behaves as the device of CUSE."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.device.semantics import *  # noqa: F403
from tests.device.semantics import KNOWN_STATE
from tests.kernel.harness import Server, errno_from, needs, servers
from tests.support.fuse import CONNECTIONS, FuseServer, needs_fuse

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def connections() -> Iterator[None]:
    """Where the kernel shows waiting requests; systemd mounts it, a container does not."""
    ours = not os.listdir(CONNECTIONS) and not os.path.ismount(CONNECTIONS) and os.getuid() == 0
    if ours:
        subprocess.run(["mount", "-t", "fusectl", "none", CONNECTIONS], check=True)
    needs(os.path.ismount(CONNECTIONS), f"no fusectl on {CONNECTIONS}")
    yield
    if ours:
        subprocess.run(["umount", CONNECTIONS], check=True)


@pytest.fixture(scope="module")
def server(connections: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    needs_fuse()
    for make in servers(tmp_path_factory.mktemp("fuse"), FuseServer):
        server = make("vtpm0")
        server.state.mkdir()
        shutil.copy(KNOWN_STATE, server.permall)
        yield server.start()


def test_is_no_terminal_and_no_file(fd: int) -> None:
    assert not os.isatty(fd)
    assert errno_from(lambda: os.lseek(fd, 100, os.SEEK_SET)) == errno.ESPIPE
    assert errno_from(lambda: os.pread(fd, 1, 0)) == errno.ESPIPE
    assert errno_from(lambda: os.ftruncate(fd, 0)) == errno.EPERM
    assert errno_from(lambda: os.fchmod(fd, 0o666)) == errno.EPERM
