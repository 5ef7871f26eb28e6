"""The device of CUSE."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import shutil
from typing import TYPE_CHECKING

import pytest

from tests.device.semantics import *  # noqa: F403
from tests.device.semantics import KNOWN_STATE
from tests.kernel.harness import errno_from

if TYPE_CHECKING:
    from tests.kernel.conftest import Serve
    from tests.kernel.harness import Server

pytestmark = pytest.mark.usefixtures("warm")


@pytest.fixture(scope="module")
def server(module_serve: Serve) -> Server:
    server = module_serve("vtpmsem")
    server.state.mkdir()
    shutil.copy(KNOWN_STATE, server.permall)
    return server.start()


def test_is_no_terminal_and_no_file(fd: int) -> None:
    assert not os.isatty(fd)
    assert os.lseek(fd, 100, os.SEEK_SET) == 0
    assert errno_from(lambda: os.fsync(fd)) == errno.EINVAL
    assert errno_from(lambda: mmap.mmap(fd, 4096)) == errno.ENODEV
    assert errno_from(lambda: os.ftruncate(fd, 0)) == errno.EINVAL
    fionread = 0x541B  # the kernel itself answers it for files
    assert errno_from(lambda: fcntl.ioctl(fd, fionread, bytearray(4))) == errno.EINVAL
