"""What root opens for the user of --runas: nothing below a path that others can turn."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from tests.support import sockets as s
from tests.support.fuse import SWTPM_FUSE, mounts, needs_fuse
from tests.support.waiting import PATIENCE_SECONDS, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

USER: Final = 65534  # one that fusermount3 finds a name for
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture
def users() -> Iterator[Path]:
    """A user's folder, with a state and a link to root's folder in it.

    Where that user gets to; pytest's own folders are root's alone.
    """
    with tempfile.TemporaryDirectory(prefix="runas.", dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        yield made_below(Path(folder))


def made_below(folder: Path) -> Path:
    roots, users = folder / "roots", folder / "users"
    roots.mkdir(mode=0o755)
    (roots / "present").write_text("root's")
    (users / "state").mkdir(parents=True)
    (users / "link").symlink_to(roots)
    for path in (users, users / "state"):
        os.chown(path, USER, USER)
    return users


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        path.name: (path.stat().st_uid, path.read_bytes() if path.is_file() else b"")
        for path in folder.iterdir()
    }


def words(users: Path, *more: str | Path) -> list[str | Path]:
    return [
        *("--tpm2", "--tpmstate", f"dir={users / 'state'}", "--runas", str(USER), *s.RUNNING),
        *("--ctrl", f"type=unixio,path={users / 'c'}", *more),
    ]


@pytest.mark.parametrize("more", [(), ("--daemon",)], ids=["foreground", "background"])
@pytest.mark.parametrize("name", ["new", "present"])
@pytest.mark.parametrize(
    "option", ["--log=file={}", "--log=file={},truncate", "--pid=file={}", "--pcap=file={}"]
)
def test_a_link_of_the_users_leads_to_nothing_of_roots(
    option: str, name: str, more: tuple[str, ...], users: Path
) -> None:
    before = contents(users.parent / "roots")
    path = users / "link" / name
    done = s.run_swtpm(*words(users, option.format(path), *more))
    assert done.returncode == 1
    assert "Permission denied" in done.stderr
    assert str(path) in done.stderr
    assert done.stderr.count("\n") == 1
    assert contents(users.parent / "roots") == before
    wait_until(lambda: not (users / "c").exists(), "its end")


def test_the_reason_is_told(users: Path) -> None:
    done = s.run_swtpm(*words(users, f"--log=file={users / 'link' / 'log'}"))
    assert f"for user {USER}: others than root can change {users}" in done.stderr


@pytest.mark.parametrize("place", ["users/own", "roots/own", "shared/own"])
def test_where_the_user_or_root_alone_decides_all_is_the_users(place: str, users: Path) -> None:
    folder = users.parent / place
    folder.parent.mkdir(exist_ok=True)
    folder.mkdir()
    if place.startswith("users"):
        os.chown(folder, USER, USER)
    if place.startswith("shared"):
        folder.chmod(0o1777)
    log, pid = folder / "log", folder / "pid"
    for _ in range(2):  # a second start finds the log
        done = s.run_swtpm(*words(users, f"--log=file={log}", f"--pid=file={pid}", "--daemon"))
        assert (done.returncode, done.stderr) == (0, "")
        assert {log.stat().st_uid, pid.stat().st_uid} == {USER}
        assert stat.S_IMODE(log.stat().st_mode) == 0o600
        os.kill(int(pid.read_text()), signal.SIGTERM)
        wait_until(lambda: not (users / "c").exists(), "its end")


def test_a_profile_is_read_as_the_user(users: Path) -> None:
    secret = users.parent / "roots" / "secret"
    secret.write_text("root:x:0:0")
    secret.chmod(0o600)
    done = s.run_swtpm(*words(users, f"--profile=file={users / 'link' / 'secret'}"))
    assert done.returncode == 1
    assert "Permission denied" in done.stderr


def fuse(users: Path, mount: str, state: str) -> list[str]:
    needs_fuse()
    words = (*SWTPM_FUSE, "-n", "vtpm", "--foreground", "--runas", str(USER))
    return [*words, "--mount", str(users / mount), "--tpmstate", f"dir={users / state}"]


@pytest.mark.parametrize(("mount", "state"), [("mount", "link/new"), ("link/new", "state")])
def test_no_folder_of_the_users_in_roots(mount: str, state: str, users: Path) -> None:
    """Neither of the state nor of the mount."""
    before = contents(users.parent / "roots")
    words = fuse(users, mount, state)
    done = subprocess.run(words, check=False, capture_output=True, text=True, env=s.environment())
    assert done.returncode == 1
    assert "Permission denied" in done.stderr
    assert contents(users.parent / "roots") == before


def test_folders_of_a_mount_are_the_users(users: Path) -> None:
    mount, state, pid = users / "mount", users / "new" / "state", users.parent / "roots" / "pid"
    words = [*fuse(users, "mount", "new/state"), "--pid", f"file={pid}"]
    with subprocess.Popen(words, env=s.environment()) as process:
        wait_until(lambda: pid.exists() and pid.read_text() != "", "the pid file")
        assert str(mount) in dict(mounts())
        assert {path.stat().st_uid for path in (state, state.parent, pid)} == {USER}
        process.terminate()
        assert process.wait(PATIENCE_SECONDS) == 0
    assert not mount.exists()
