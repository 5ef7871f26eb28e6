"""What makes a mount impossible before fusermount3 is asked, and a mount of somebody else's."""

from __future__ import annotations

import builtins
import fcntl
import io
import os
import socket
import struct
import subprocess
from typing import TYPE_CHECKING, Final, Never

import pytest
import trio

from tests.support.kernel import FakeKernel
from vtpm_cuse.acquire import mount as fuse
from vtpm_cuse.acquire.mount import FuseMount
from vtpm_cuse.errors import FrontendError

if TYPE_CHECKING:
    from pathlib import Path

INIT: Final = 26


def said_by(mount: FuseMount) -> str:
    with pytest.raises(FrontendError) as caught:
        mount.take_folder()
    mount.close()
    return str(caught.value)


def test_no_fuse(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fuse, "FUSE_PATH", str(tmp_path / "fuse"))
    said = said_by(FuseMount(str(tmp_path / "mount")))
    assert said == f"fuse: {tmp_path}/fuse not found; try 'modprobe fuse' as root first"
    assert not (tmp_path / "mount").exists()


def test_no_right_to_fuse(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fuse, "FUSE_PATH", "/dev/null")
    monkeypatch.setattr(fuse, "_FUSE_DEVICE", os.stat("/dev/null").st_rdev)
    monkeypatch.setattr(os, "access", lambda *_: False)
    said = said_by(FuseMount(str(tmp_path / "mount")))
    assert said == "fuse: no right to use /dev/null; ask for its mode 0666"


@pytest.fixture
def any_fuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse, "FUSE_PATH", "/dev/null")
    monkeypatch.setattr(fuse, "_FUSE_DEVICE", os.stat("/dev/null").st_rdev)


@pytest.mark.usefixtures("any_fuse")
def test_folder_is_made_and_removed(tmp_path: Path) -> None:
    folder = tmp_path / "a b/c"
    mount = FuseMount(str(folder))
    assert not folder.exists()
    mount.take_folder()
    assert folder.stat().st_mode & 0o777 == 0o700
    mount.close()
    assert not folder.exists()
    mount.close()


@pytest.mark.usefixtures("any_fuse")
def test_folder_of_the_user_stays(tmp_path: Path) -> None:
    mount = FuseMount(str(tmp_path))
    mount.take_folder()
    mount.close()
    assert tmp_path.exists()


@pytest.mark.usefixtures("any_fuse")
def test_folder_is_taken_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fuse, "_LEAVING_SECONDS", 0.0)
    first = FuseMount(str(tmp_path / "x"))
    first.take_folder()
    assert "is in use" in said_by(FuseMount(str(tmp_path / "x")))
    assert (tmp_path / "x").exists()
    first.close()


@pytest.mark.usefixtures("any_fuse")
def test_another_mount_is_in_use() -> None:
    assert "/proc is in use: something is mounted there" in said_by(FuseMount("/proc"))


@pytest.mark.usefixtures("any_fuse")
def test_folder_removed_by_the_one_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Between our open and our lock: then it is made again."""
    folder = tmp_path / "x"
    folder.mkdir()
    really = fcntl.flock
    calls: list[int] = []

    def flock(fd: int, how: int) -> None:
        if not calls:
            folder.rmdir()
        calls.append(fd)
        really(fd, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    mount = FuseMount(str(folder))
    mount.take_folder()
    assert len(calls) == 2
    assert os.path.samestat(os.fstat(calls[-1]), folder.stat())
    mount.close()


def test_names_with_blanks_are_found_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """mountinfo writes them as \\040."""
    line = "36 35 0:55 / /a\\040b\\134c rw - fuse.vtpm swtpm rw\n"
    monkeypatch.setattr(builtins, "open", lambda *_args, **_more: io.StringIO(line))
    assert fuse._mounted_on("/a b\\c") == "0:55"
    assert fuse._mounted_on("/a") is None


# -- a mount that somebody else has made ----------------------------------------------------------


def test_an_adopted_mount_is_served_and_left_to_its_maker(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It has the first request answered, and nothing is locked, removed or started for it."""

    def start_nothing(*_: object, **_more: object) -> Never:
        raise AssertionError("a program")

    monkeypatch.setattr(subprocess, "run", start_nothing)
    kernel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with kernel:
        mount = FuseMount.adopt(str(tmp_path), theirs.detach())
        assert not os.get_blocking(mount.fd)
        kernel.send(FakeKernel.message(INIT, 2, struct.pack("=IIII", 7, 38, 4096, 8) + bytes(48)))
        trio.run(mount.answer_init)
        reply = kernel.recv(4096)
        assert struct.unpack_from("=IiQ", reply) == (len(reply), 0, 2)
        assert struct.unpack_from("=II", reply, 16) == (7, 38)
        fcntl.flock(folder := os.open(tmp_path, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(folder)
        mount.close()
        assert kernel.recv(1) == b""
        assert mount.fd == -1
        mount.close()
    assert tmp_path.exists()
