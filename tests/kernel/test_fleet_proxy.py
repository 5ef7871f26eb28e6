"""TPMs of a manager that are the kernel's own: who uses them, sleep, deaths, the end."""

from __future__ import annotations

import os
import signal
import stat
from typing import TYPE_CHECKING, Final

import pytest

from tests.kernel.harness import PATIENCE, errno_from, needs, run
from tests.support import commands as tpm
from tests.support.vtpmd import begin_anew, running
from tests.support.waiting import wait_until
from vtpm_cuse.client.manager import Manager

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.vtpmd import Daemon
    from vtpm_cuse.wire.manager import Tpm

USER: Final = 4242


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    error = errno_from(lambda: os.close(os.open("/dev/vtpmx", os.O_RDWR)))
    needs(not error, f"/dev/vtpmx: {os.strerror(error)}; run kernel-helpers/lab -- ...")
    folder = tmp_path_factory.mktemp("vtpmd")
    with running(folder, "--idle", "3600", seconds=PATIENCE) as found:
        yield found


def made(daemon: Daemon, name: str) -> Tpm:
    with Manager(str(daemon.path)) as manager:
        manager.create(name, interface="vtpm-proxy", owner=USER)
        return manager.start(name)


def described(daemon: Daemon, name: str) -> Tpm:
    with Manager(str(daemon.path)) as manager:
        return manager.describe(name)


def ask(fd: int, command: bytes) -> bytes:
    assert os.write(fd, command) == len(command)
    return os.read(fd, 4096)


def paths_of(found: Tpm) -> tuple[str, str]:
    assert found.device is not None
    assert found.managed_device is not None
    return found.device, found.managed_device


def test_a_tpm_of_the_kernels_outlives_sleep_restart_and_death(daemon: Daemon) -> None:
    found = made(daemon, "one")
    raw, many = paths_of(found)
    for path in (raw, many):
        node = os.stat(path)
        assert stat.S_ISCHR(node.st_mode)
        assert (node.st_mode & 0o777, node.st_uid) == (0o600, USER)
    words = ["tpm2_getrandom", "-T", f"device:{many}", "--hex", "8"]
    assert len(run(*words).stdout) == 16
    fd = os.open(many, os.O_RDWR)
    assert tpm.code_of(ask(fd, tpm.pcr_extend(10, b"1" * 32))) == 0
    extended = ask(fd, tpm.pcr_read(10))
    with Manager(str(daemon.path)) as manager:
        for _ in range(2):
            assert manager.hibernate("one").pid is None
            assert ask(fd, tpm.pcr_read(10)) == extended
        manager.hibernate("one")
    begin_anew(daemon)
    assert ask(fd, tpm.pcr_read(10)) == extended
    begin_anew(daemon)  # with the TPM awake
    assert ask(fd, tpm.pcr_read(10)) == extended
    pid = described(daemon, "one").pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: described(daemon, "one").state == "failed", "the death of the worker")
    assert tpm.code_of(ask(fd, tpm.pcr_read(10))) == 0x101
    with Manager(str(daemon.path)) as manager:
        manager.reset("one")
        assert tpm.pcr_value(ask(fd, tpm.pcr_read(10))) == bytes(32)
        other = made(daemon, "two")
        assert set(paths_of(other)).isdisjoint((raw, many))
        assert tpm.code_of(ask(fd, tpm.get_random(8))) == 0
        os.close(fd)
        manager.stop("one")
        assert not os.path.exists(raw)
        assert described(daemon, "one").device is None
        manager.remove("two", force=True)
        again = manager.start("one")
        assert os.path.exists(paths_of(again)[1])
        assert len(run("tpm2_getrandom", "-T", f"device:{again.device}", "--hex", "8").stdout) == 16
        manager.hibernate("one")
        manager.remove("one", force=True)
    assert not os.path.exists(many)


def test_with_its_manager_killed_the_kernel_has_none(daemon: Daemon) -> None:
    raw, many = paths_of(made(daemon, "last"))
    daemon.process.kill()
    daemon.process.wait()
    wait_until(lambda: not os.path.exists(raw) and not os.path.exists(many), "its end")
