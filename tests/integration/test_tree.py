"""`vtpm tree` on a manager with real TPMs: what is there, for whom, and how it ends."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from tests.support import commands as tpm
from tests.support.fuse import mounts, needs_fuse, ordinary_user
from tests.support.sockets import connect, environment, listens
from tests.support.vtpm_run import VTPM
from tests.support.vtpmd import begin_anew, running
from tests.support.waiting import PATIENCE_SECONDS, wait_until
from vtpm_cuse.client.child import program_words
from vtpm_cuse.client.manager import Manager

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.support.vtpmd import Daemon

OTHER: Final = 4242


@pytest.fixture(scope="module", autouse=True)
def _machine() -> None:
    pytest.importorskip("pyfuse3")
    needs_fuse()


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with running(tmp_path_factory.mktemp("vtpmd"), "--idle", "3600") as found:
        yield found
        assert found.end() == 0


@contextlib.contextmanager
def tree(
    folder: Path, socket: Path, *words: str, before: Sequence[str] = ()
) -> Iterator[subprocess.Popen[str]]:
    """One that is mounted there, by whoever *before* says."""
    shown = subprocess.Popen(
        [*before, *VTPM, "tree", *words, "--socket", str(socket), str(folder)],
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    try:
        wait_until(lambda: str(folder) in dict(mounts()), "the mount", process=shown)
        with contextlib.suppress(PermissionError):
            os.stat(folder)  # waits until it is served
        yield shown
    finally:
        shown.kill()
        shown.communicate()
        wait_until(partial(is_gone, folder), "its end")


def is_gone(folder: Path) -> bool:
    """Its mount, and the folder that was made for it."""
    return str(folder) not in dict(mounts()) and not folder.exists()


def refusal(path: Path) -> str:
    """The name of the error that reading it is."""
    try:
        return str(path.read_bytes())
    except OSError as exc:
        return errno.errorcode[exc.errno or 0]


def test_what_is_there_of_one_awake_asleep_and_off(daemon: Daemon, tmp_path: Path) -> None:
    top = tmp_path / "tree"
    one = top / "one"
    with tree(top, daemon.path), Manager(str(daemon.path)) as manager:
        assert os.listdir(top) == []
        manager.create("one", labels={"vm": "7"})
        manager.create("off")
        found = manager.start("one")
        assert sorted(os.listdir(top)) == ["off", "one"]
        assert (one / "state").read_text() == "awake\n"
        assert (one / "labels").read_text() == "vm=7\n"
        assert json.loads((one / "status").read_text())["id"] == found.id
        assert (one / "log").read_text().split()[1::2] == ["created", "started"]
        assert f'tpm="one",owner="{found.owner}",state="awake"' in (one / "metrics").read_text()
        assert not (one / "device").exists()
        with connect(Path(found.sockets["data"])) as client:
            client.command(tpm.pcr_extend(10, b"1" * 32))
            value = tpm.pcr_value(client.command(tpm.pcr_read(10)))
        assert (one / "pcr-sha256/10").read_text() == f"{value.hex().upper()}\n"
        assert len(os.listdir(one / "pcr-sha256")) == 24
        assert "TCG version: 2.0\n" in (one / "caps").read_text()
        assert refusal(one / "ek.crt") == refusal(one / "pcr-sha256/24") == "ENOENT"
        for name in ("nix", ".git", found.id, os.fsdecode(b"\xff"), "n" * 255):
            assert refusal(top / name / "state") == refusal(top / name) == "ENOENT", name
        manager.hibernate("one")
        assert (one / "state").read_text() == "asleep\n"
        assert refusal(one / "pcr-sha256/10") == refusal(one / "caps") == "EAGAIN"
        assert manager.describe("one").counters["wakes"] == 0
        assert refusal(top / "off/caps") == "EIO"
        for change in (one.rmdir, (one / "id").unlink, partial((one / "id").write_text, "x")):
            with pytest.raises(OSError, match="Read-only"):
                change()


def test_it_goes_on_with_the_next_manager_and_tells_tpms_of_one_name_apart(
    daemon: Daemon, tmp_path: Path
) -> None:
    top = tmp_path / "tree"
    with tree(top, daemon.path):
        with Manager(str(daemon.path)) as manager:
            made = manager.create("two")
        before = os.open(top / "two", os.O_RDONLY | os.O_DIRECTORY)
        assert (top / "two/id").read_text() == f"{made.id}\n"
        begin_anew(daemon)
        wait_until(partial(listens, daemon.path), "the next manager")
        assert (top / "two/state").read_text() == "stopped\n"
        with Manager(str(daemon.path)) as manager:
            manager.remove("two")
            again = manager.create("two")
        with pytest.raises(FileNotFoundError):
            os.open("id", os.O_RDONLY, dir_fd=before)
        os.close(before)
        assert (top / "two/id").read_text() == f"{again.id}\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="gives TPMs to others")
def test_others_find_what_is_theirs_alone(daemon: Daemon) -> None:
    with ordinary_user() as user, Manager(str(daemon.path)) as manager:
        top = user.folder / "tree"
        his = user.folder.stat().st_uid
        for name, owner in (("mine", his), ("theirs", OTHER)):
            manager.create(name, owner=owner)
        with tree(top, daemon.path, "--allow-other"):
            look = f"cat {top}/mine/owner; cat {top}/theirs/owner; ls {top}; ls {top}/theirs"
            done = user.run("sh", "-c", look, status=2)
            assert done.stdout == f"{his}\n"
            assert done.stderr.count("Permission denied") == 3


def test_nobody_has_a_tree_of_his_own() -> None:
    """And root does not see it."""
    with ordinary_user() as user:
        words = [*user.prefix, *program_words("vtpm_cuse.cli.vtpmd"), "--user"]
        folders = ("--state", str(user.folder / "state"), "--run", str(user.folder / "run"))
        with subprocess.Popen([*words, *folders], env=environment() | user.env) as own:
            socket = user.folder / "run/manager.sock"
            wait_until(partial(listens, socket), "his manager", process=own)
            with Manager(str(socket)) as manager:
                manager.create("his", owner=user.folder.stat().st_uid)
            top = user.folder / "tree"
            with tree(top, socket, before=user.prefix) as shown:
                assert user.run("cat", top / "his/state").stdout == "stopped\n"
                if user.prefix:
                    assert refusal(top / "his/state") == "EACCES"
                shown.send_signal(signal.SIGTERM)
                assert shown.wait(PATIENCE_SECONDS) == 0
            own.terminate()
            assert own.wait(PATIENCE_SECONDS) == 0


@pytest.mark.parametrize("by", ["unmount", "SIGINT", "SIGKILL"])
def test_its_end_leaves_nothing(by: str, daemon: Daemon, tmp_path: Path) -> None:
    top = tmp_path / "tree"
    with tree(top, daemon.path) as shown:
        if by == "unmount":
            subprocess.run(["fusermount3", "-u", str(top)], check=True)
        else:
            shown.send_signal(signal.Signals[by])
        status = shown.wait(PATIENCE_SECONDS)
        assert status == (-signal.SIGKILL if by == "SIGKILL" else 0)
        assert shown.stderr is not None
        assert shown.stderr.read() == ""
