"""`vtpmd` as its users meet it: asked on its socket, and from the sockets of its TPMs."""

from __future__ import annotations

import contextlib
import os
import re
import stat
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.support.sockets import connect
from tests.support.vtpmd import Daemon, running
from tests.support.waiting import PATIENCE_SECONDS
from vtpm_cuse.client.manager import Manager
from vtpm_cuse.errors import FleetError, FrontendError
from vtpm_cuse.lab.tpm import tcti_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

USER = 4242


def random_bytes(path: str) -> str:
    """From tpm2-tools, a client of the resource manager."""
    command = ["tpm2_getrandom", "-T", tcti_of(path), "--hex", "8"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_from_its_start_to_its_next(tmp_path: Path) -> None:
    with running(tmp_path, "--idle", "1") as daemon, Manager(str(daemon.path)) as manager:
        assert stat.S_IMODE(daemon.path.stat().st_mode) == 0o600
        tpm = manager.create("web1", labels={"vm": "7"})
        with Manager(str(daemon.path)) as watcher:
            events = watcher.watch()
            manager.start("web1")
            assert re.fullmatch("[0-9a-f]{16}", random_bytes(tpm.sockets["managed"]))
            assert next(event for event in events if event.tpm.state == "asleep").tpm.pid is None
            assert re.fullmatch("[0-9a-f]{16}", random_bytes(tpm.sockets["managed"]))
            assert manager.describe("web1").counters["commands"] >= 2
            manager.wake("web1")  # a client may be answered before it is known to be awake
            with connect(tmp_path / "run/metrics") as monitoring:
                monitoring.send(b"GET /metrics HTTP/1.1\r\n\r\n")
                assert re.search(rb"\nvtpm_wake_seconds_count [1-9]", monitoring.rest())
            with Daemon(tmp_path) as second:
                assert second.process.wait(PATIENCE_SECONDS) == 1
                assert "Traceback" not in second.said
            assert manager.describe("web1").id == tpm.id
            # Neither a watcher nor one who says nothing keeps it from ending.
            assert daemon.end() == 0
            with pytest.raises(FrontendError):
                manager.list()
        assert not daemon.path.exists()
    with running(tmp_path) as daemon, Manager(str(daemon.path)) as manager:
        (again,) = manager.list()
        assert (again.id, again.state, again.labels) == (tpm.id, "stopped", {"vm": "7"})
        assert manager.start("web1").state in {"awake", "asleep"}
        manager.remove("web1", force=True)
        assert manager.list() == []
        assert daemon.end() == 0


@contextlib.contextmanager
def asked_by(user: int) -> Iterator[Manager]:
    """Somebody who may not go where the tests are; the kernel notes him when he connects."""
    os.setegid(user)
    os.seteuid(user)
    try:
        manager = Manager("manager.sock")
    finally:
        os.seteuid(0)
        os.setegid(0)
    with manager:
        yield manager


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be several users")
def test_a_group_each_with_his_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(tmp_path, "--group", str(USER)) as daemon, Manager(str(daemon.path)) as roots:
        monkeypatch.chdir(daemon.path.parent)
        roots.create("roots")
        with asked_by(USER) as manager:
            tpm = manager.create("theirs")
            assert manager.start("theirs").owner == USER
            assert os.stat(tpm.sockets["managed"]).st_uid == USER
            assert [one.name for one in manager.list()] == ["theirs"]
            for request in (manager.start, manager.remove, manager.describe):
                with pytest.raises(FleetError) as info:
                    request("roots")
                assert info.value.fault == "NotOwner"
        with pytest.raises(FrontendError, match="Permission denied"), asked_by(USER + 1):
            pass
        assert [one.name for one in roots.list()] == ["roots", "theirs"]
        roots.stop("theirs")
        assert daemon.end() == 0
