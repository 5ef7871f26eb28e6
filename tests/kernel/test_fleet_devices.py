"""TPMs of a manager on real CUSE devices: numbers, owners, sleep, deaths, the end."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
import trio

from tests.kernel.harness import PATIENCE, PTM_INIT, run
from tests.support import commands as tpm
from tests.support.vtpmd import running
from tests.support.waiting import wait_until
from vtpm_cuse.client.manager import Manager
from vtpm_cuse.errors import FrontendError
from vtpm_cuse.fleet.opener import Opener, Wanted

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.usefixtures("cuse")

USER: Final = 4242
MANY: Final = 160
"""More than there are dynamic major numbers."""


@pytest.fixture(scope="module")
def manager(cuse: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Manager]:
    with (
        running(tmp_path_factory.mktemp("vtpmd"), "--idle", "3600", seconds=PATIENCE) as daemon,
        Manager(str(daemon.path)) as found,
    ):
        yield found


@contextlib.contextmanager
def opened(path: str) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR)
    try:
        yield fd
    finally:
        os.close(fd)


def ask(fd: int, command: bytes) -> bytes:
    assert os.write(fd, command) == len(command)
    return os.read(fd, 4096)


def test_a_tpm_is_two_devices_that_outlive_sleep_and_death(manager: Manager) -> None:
    made = manager.create("one", interface="cuse", owner=USER)
    raw, many = "/dev/vtpmd-one", "/dev/vtpmdrm-one"
    assert (made.interface, made.device, made.managed_device) == ("cuse", raw, many)
    assert not os.path.exists(raw)
    manager.start("one")
    found = [os.stat(path) for path in (raw, many)]
    assert [(stat.S_ISCHR(one.st_mode), one.st_mode & 0o777, one.st_uid) for one in found] == [
        (True, 0o600, USER)
    ] * 2
    numbers = [(os.major(one.st_rdev), os.minor(one.st_rdev)) for one in found]
    assert numbers == [(numbers[0][0], 0), (numbers[0][0], 1)]
    assert len(run("tpm2_getrandom", "-T", f"device:{many}", "--hex", "8").stdout) == 16
    with opened(raw) as fd, opened(many) as other:
        assert tpm.code_of(ask(fd, tpm.pcr_extend(10, b"1" * 32))) == 0
        extended = ask(fd, tpm.pcr_read(10))
        for _ in range(2):
            assert manager.hibernate("one").pid is None
            assert ask(fd, tpm.pcr_read(10)) == extended
            assert tpm.code_of(ask(other, tpm.get_random(8))) == 0
        pid = manager.describe("one").pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: manager.describe("one").state == "failed", "the death of the worker")
        assert tpm.code_of(ask(fd, tpm.pcr_read(10))) == 0x101
        assert tpm.code_of(ask(other, tpm.pcr_read(10))) == 0x101
        assert fcntl.ioctl(fd, PTM_INIT, bytes(4)) == bytes(4)
        assert tpm.code_of(ask(fd, tpm.TPM2_STARTUP_CLEAR)) == 0
        assert tpm.pcr_value(ask(other, tpm.pcr_read(10))) == bytes(32)
        assert manager.describe("one").state == "awake"
        manager.stop("one")
        assert not os.path.exists(raw)
        assert not os.path.exists(many)
    manager.start("one")
    again = [os.stat(path).st_rdev for path in (raw, many)]
    assert again == [one.st_rdev for one in found]
    manager.remove("one", force=True)
    assert not os.path.exists(raw)


def test_more_than_there_are_major_numbers() -> None:
    made: list[int] = []

    async def make(opener: Opener) -> set[int]:
        major = 0
        for number in range(MANY):
            device = await opener.make(Wanted(f"vtpmd-many{number}", 0, major, number))
            made.append(device.fd)
            major = device.number
        with pytest.raises(FrontendError, match="taken"):
            await opener.make(Wanted("vtpmd-many0", 0, major, MANY))
        return {os.stat(f"/dev/vtpmd-many{number}").st_rdev for number in range(MANY)}

    with Opener("/nonexistent", own=False) as opener:
        numbers = trio.run(make, opener)
    assert len(numbers) == MANY
    assert len({os.major(number) for number in numbers}) == 1
    for fd in made:
        os.close(fd)
    assert not list(Path("/dev").glob("vtpmd-many*"))
