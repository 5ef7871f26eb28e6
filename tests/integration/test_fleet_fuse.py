"""TPMs of a user's own manager as files in mounts: sleep, deaths, the end; on the real FUSE."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import subprocess
import threading
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from tests.support import commands as tpm
from tests.support import ptm
from tests.support.service_manager import Service
from tests.support.vtpmd import Daemon, begin_anew, running
from tests.support.waiting import PATIENCE_SECONDS, wait_until
from vtpm_cuse.client.manager import Manager
from vtpm_cuse.errors import FleetError, FrontendError

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def managing(folder: Path, *words: str) -> Iterator[tuple[Daemon, Manager]]:
    with (
        running(folder, "--user", "--idle", "3600", *words) as daemon,
        Manager(str(daemon.path)) as manager,
    ):
        yield daemon, manager


def opened(path: str | None) -> int:
    assert path is not None
    return os.open(path, os.O_RDWR)


def ask(fd: int, command: bytes) -> bytes:
    assert os.write(fd, command) == len(command)
    return os.read(fd, 4096)


def fails(fd: int) -> bool:
    try:
        ask(fd, tpm.get_random(8))
    except OSError as exc:
        return exc.errno in {errno.ENOTCONN, errno.ECONNABORTED}
    return False


def mounts_below(folder: Path) -> list[str]:
    lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.split()[4].startswith(f"{folder}/")]


def mounting(daemon: Daemon) -> list[int]:
    """Of the two processes that mount for it, the one that works."""
    pid = daemon.process.pid
    children = [*map(int, of(pid).split())]
    names = [Path(f"/proc/{one}/comm").read_text(encoding="ascii") for one in children]
    (other,) = (one for one, name in zip(children, names, strict=True) if name == "vtpm-opener\n")
    return [*map(int, of(other).split())]


def of(pid: int) -> str:
    """Its children."""
    return Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")


def kill_worker(manager: Manager) -> None:
    pid = manager.describe("one").pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: manager.describe("one").state == "failed", "the death of the worker")


def test_a_tpm_is_two_files_that_outlive_sleep_and_death(tmp_path: Path) -> None:
    with managing(tmp_path) as (daemon, manager):
        made = manager.create("one", interface="fuse")
        folder = tmp_path / "run/tpm/one"
        assert (made.device, made.managed_device, made.sockets) == (
            *(f"{folder}/vtpm0", f"{folder}/vtpmrm0"),
            {},
        )
        manager.start("one")
        assert sorted(os.listdir(folder)) == ["vtpm0", "vtpmrm0"]
        words = ["tpm2_getrandom", "-T", f"device:{made.managed_device}", "--hex", "8"]
        assert len(subprocess.run(words, check=True, capture_output=True).stdout) == 16
        raw, many = opened(made.device), opened(made.managed_device)
        assert tpm.code_of(ask(raw, tpm.pcr_extend(10, b"1" * 32))) == 0
        extended = ask(raw, tpm.pcr_read(10))
        for _ in range(2):
            assert manager.hibernate("one").pid is None
            assert ask(raw, tpm.pcr_read(10)) == extended
            assert tpm.code_of(ask(many, tpm.get_random(8))) == 0
        kill_worker(manager)
        assert tpm.code_of(ask(raw, tpm.pcr_read(10))) == 0x101
        assert tpm.code_of(ask(many, tpm.pcr_read(10))) == 0x101
        assert fcntl.ioctl(raw, ptm.INIT, bytes(4)) == bytes(4)
        assert tpm.code_of(ask(raw, tpm.TPM2_STARTUP_CLEAR)) == 0
        assert tpm.pcr_value(ask(many, tpm.pcr_read(10))) == bytes(32)
        assert manager.describe("one").state == "awake"
        for fd in (raw, many):
            os.close(fd)
        manager.stop("one")
        assert not folder.exists()
        manager.start("one")
        manager.remove("one", force=True)
        assert not folder.exists()
        manager.create("two", interface="fuse")
        manager.start("two")
        assert daemon.end() == 0
    assert mounts_below(tmp_path) == []


def test_a_mount_stays_while_the_manager_begins_anew(tmp_path: Path) -> None:
    """And with it what containers are told of it."""
    with managing(tmp_path, "--cdi", str(tmp_path / "cdi")) as (daemon, manager):
        path = manager.create("one", interface="fuse", cdi="keep").device
        manager.start("one")
        (document,) = (tmp_path / "cdi").iterdir()
        raw = opened(path)
        assert tpm.code_of(ask(raw, tpm.pcr_extend(10, b"1" * 32))) == 0
        extended = ask(raw, tpm.pcr_read(10))
        manager.hibernate("one")
        begin_anew(daemon)
        assert ask(raw, tpm.pcr_read(10)) == extended
        begin_anew(daemon)  # with the TPM awake
        assert ask(raw, tpm.pcr_read(10)) == extended
        os.close(raw)
        assert document.exists()
        with Manager(str(daemon.path)) as anew:
            anew.stop("one")
        assert mounts_below(tmp_path) == []
        assert not document.exists()
        assert daemon.end() == 0


def test_what_a_killed_manager_leaves_is_cleared_up(tmp_path: Path) -> None:
    offering = ("--cdi", str(tmp_path / "cdi"))
    with managing(tmp_path, *offering) as (daemon, manager):
        path = manager.create("one", interface="fuse", cdi="keep").device
        manager.start("one")
        (document,) = (tmp_path / "cdi").iterdir()
        raw = opened(path)
        daemon.process.kill()
        daemon.process.wait()
        wait_until(lambda: mounts_below(tmp_path) == [], "the end of the mount")
        wait_until(lambda: fails(raw), "the end of the worker")
        with contextlib.suppress(OSError):  # it is closed, and says that nobody was told
            os.close(raw)
        assert document.exists()
    with managing(tmp_path, *offering) as (_, manager):
        assert not document.exists()
        manager.start("one")
        raw = opened(path)
        assert tpm.code_of(ask(raw, tpm.get_random(8))) == 0
        os.close(raw)


def test_a_manager_that_is_refused_ends_no_mount_of_the_other(tmp_path: Path) -> None:
    with managing(tmp_path) as (_, manager):
        path = manager.create("one", interface="fuse").device
        manager.start("one")
        raw = opened(path)
        with Daemon(tmp_path, "--user") as second:
            assert second.process.wait(PATIENCE_SECONDS) == 1
            assert "another manager has it" in second.said
        assert len(mounts_below(tmp_path)) == 1
        assert tpm.code_of(ask(raw, tpm.get_random(8))) == 0
        os.close(raw)


def test_who_mounts_may_die(tmp_path: Path) -> None:
    with managing(tmp_path) as (daemon, manager):
        paths = [manager.create(name, interface="fuse").device for name in ("one", "two")]
        manager.start("one")
        raw = opened(paths[0])
        assert tpm.code_of(ask(raw, tpm.pcr_extend(10, b"1" * 32))) == 0
        extended = ask(raw, tpm.pcr_read(10))
        (works,) = found = mounting(daemon)
        os.kill(works, signal.SIGKILL)
        manager.start("two")
        assert mounting(daemon) != found
        os.close(opened(paths[1]))
        manager.hibernate("one")
        assert ask(raw, tpm.pcr_read(10)) == extended
        os.close(raw)
        manager.stop("one")  # whose mount it has not made
        assert [line.split()[4] for line in mounts_below(tmp_path)] == [f"{tmp_path}/run/tpm/two"]
        manager.start("one")
        os.kill(mounting(daemon)[0], signal.SIGKILL)
        daemon.process.kill()
        daemon.process.wait()
        wait_until(lambda: mounts_below(tmp_path) == [], "the end of both mounts")


@pytest.mark.skipif(
    tuple(map(int, os.uname().release.split(".")[:2])) < (6, 9),
    reason="an older kernel hands out no request again",
)
def test_a_call_that_the_dead_one_owed_an_answer_gets_one(tmp_path: Path) -> None:
    with managing(tmp_path) as (_, manager):
        path = manager.create("one", interface="fuse").device
        manager.start("one")
        raw = opened(path)
        waits = threading.Thread(target=partial(ask, raw, tpm.create_primary_rsa()))
        waits.start()
        kill_worker(manager)
        waits.join(PATIENCE_SECONDS)
        assert not waits.is_alive()
        os.close(raw)


def test_it_is_for_the_user_of_the_manager_and_no_other_kind(tmp_path: Path) -> None:
    with managing(tmp_path) as (_, manager):
        with pytest.raises(FleetError, match="manager's user alone"):
            manager.create("one", interface="fuse", owner=os.geteuid() + 1)
        with pytest.raises(Exception, match="Root's manager alone"):
            manager.create("one", interface="cuse")
        assert manager.list() == []


DYING: Final = """
import os
from vtpm_cuse.fleet.manager import entrances
known = entrances._mounted
def mounted(opener, fd, folder, nursery):
    if folder.endswith("two"):
        os.kill(os.getpid(), 9)
    return known(opener, fd, folder, nursery)
entrances._mounted = mounted
"""
"""Behind a mount that nobody else has heard of."""


def test_where_it_is_a_service_a_mount_outlives_a_killed_manager(tmp_path: Path) -> None:
    """And its restart; it ends with what is kept, and so does one that nobody knows of."""
    with Service(tmp_path, "--user", "--idle", "3600") as service:
        service.start()
        with Manager(str(service.path)) as manager:
            path = manager.create("one", interface="fuse").device
            manager.start("one")
        raw = opened(path)
        assert tpm.code_of(ask(raw, tpm.pcr_extend(10, b"1" * 32))) == 0
        extended = ask(raw, tpm.pcr_read(10))
        for end in (service.kill, service.kill, service.end):
            end()
            service.start()
            assert ask(raw, tpm.pcr_read(10)) == extended
            with Manager(str(service.path)) as manager:
                manager.hibernate("one")
        service.kill()
        service.start(DYING)
        with Manager(str(service.path)) as manager, contextlib.suppress(FrontendError):
            manager.create("two", interface="fuse")
            manager.start("two")
        service.process.wait(PATIENCE_SECONDS)
        assert len(mounts_below(tmp_path)) == 2
        service.start()
        assert len(mounts_below(tmp_path)) == 1
        with Manager(str(service.path)) as manager:
            assert [one.state for one in manager.list()] == ["asleep", "stopped"]
            manager.start("two")
        assert ask(raw, tpm.pcr_read(10)) == extended
        service.kill()
        service.forget()
        wait_until(lambda: mounts_below(tmp_path) == [], "the end of the mounts")
        wait_until(lambda: fails(raw), "the end of the worker")
        with contextlib.suppress(OSError):
            os.close(raw)
