"""Files and folders that somebody else may have prepared."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import threading
from typing import TYPE_CHECKING

import pytest

from vtpm_cuse.files import check_private, give_socket, make_folder, open_for, open_plain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

WRITING = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="needs root")


@pytest.fixture(params=[0, 0o022, 0o077, 0o777], ids=["0", "022", "077", "777"])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("flags", [os.O_RDONLY, WRITING])
@pytest.mark.parametrize("has_other_end", [False, True])
def test_fifo_in_the_way_is_an_error(flags: int, has_other_end: bool, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with contextlib.ExitStack() as stack:
        if has_other_end:
            stack.callback(os.close, os.open(fifo, os.O_RDWR))
        with pytest.raises(OSError, match="Neither a file nor a terminal"):
            open_plain(str(fifo), flags, 0o600)
        with pytest.raises(OSError, match="Neither a file nor a terminal"):
            open_for(str(fifo), flags, 0o600, (os.getuid(), os.getgid()))


def test_socket_in_the_way_is_an_error(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "socket"))
        with pytest.raises(OSError, match="Neither a file nor a terminal"):
            open_plain(str(tmp_path / "socket"), WRITING, 0o600)


@needs_root
def test_device_in_the_way_is_an_error(tmp_path: Path) -> None:
    device = tmp_path / "device"
    try:
        os.mknod(device, stat.S_IFCHR | 0o600, os.makedev(10, 229))  # /dev/fuse
        os.close(os.open(device, os.O_RDWR))
    except OSError as exc:
        pytest.skip(f"no device can be had here: {exc.strerror}")
    with pytest.raises(OSError, match="Neither a file nor a terminal"):
        open_plain(str(device), WRITING, 0o600)


def test_terminal_null_and_file_are_fine(tmp_path: Path) -> None:
    ours, theirs = os.openpty()
    try:
        for path in (os.ttyname(theirs), "/dev/null", str(tmp_path / "file")):
            fd = open_plain(path, WRITING, 0o600)
            assert os.get_blocking(fd)
            assert not os.get_inheritable(fd)
            assert os.write(fd, b"x") == 1
            os.close(fd)
        assert os.read(ours, 10) == b"x"
    finally:
        os.close(ours)
        os.close(theirs)


def test_pipe_that_a_shell_passes_is_fine() -> None:
    """As ``--key file=<(...)``: its writer may be slower than we."""
    read_end, write_end = os.pipe()
    fd = open_plain(f"/dev/fd/{read_end}", os.O_RDONLY)
    writer = threading.Thread(target=_write, args=(write_end,))
    writer.start()
    with open(fd, "rb") as file:
        assert file.read() == b"key"
    writer.join()
    os.close(read_end)


def test_folders_are_never_others_to_write(umask: int, tmp_path: Path) -> None:
    make_folder(str(tmp_path / "a" / "b" / "state"), 0o775)
    modes = [
        stat.S_IMODE(path.stat().st_mode)
        for path in (tmp_path / "a", tmp_path / "a" / "b", tmp_path / "a" / "b" / "state")
    ]
    assert modes == [0o755 & ~umask | 0o700] * 3
    before = os.umask(umask)
    assert before == umask


def test_folder_that_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o750)
    (tmp_path / "link").symlink_to("real")
    make_folder(str(tmp_path / "link"), 0o700, (12345, 12345))
    found = (tmp_path / "real").stat()
    assert (stat.S_IMODE(found.st_mode), found.st_uid) == (0o750, os.getuid())


def test_link_to_nowhere_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(OSError, match=r"symbolic links|Not a directory"):
        make_folder(str(tmp_path / "link"), 0o700)
    assert not (tmp_path / "nowhere").exists()


@needs_root
def test_folder_belongs_to_the_user_served_as(tmp_path: Path) -> None:
    make_folder(str(tmp_path / "a" / "state"), 0o700, (12345, 23456))
    leaf = (tmp_path / "a" / "state").stat()
    assert (leaf.st_uid, leaf.st_gid) == (12345, 23456)
    assert (tmp_path / "a").stat().st_uid == 0


def put_link(place: Path, target: Path) -> None:
    place.symlink_to(target)


def put_folder_with_files(place: Path, target: Path) -> None:
    target.rename(place)


def put_folder_of_another(place: Path, _target: Path) -> None:
    os.makedirs(place)
    os.chown(place, 999, 999)


@needs_root
@pytest.mark.parametrize("trap", [put_link, put_folder_with_files, put_folder_of_another])
def test_no_owner_for_what_came_in_between(
    trap: Callable[[Path, Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The owner of the folder above puts something else there as soon as ours is made."""
    target, place = tmp_path / "target", tmp_path / "parent" / "s"
    target.mkdir()
    (target / "secret").write_text("root's")
    place.parent.mkdir()
    make = os.mkdir

    def mkdir(path: str, mode: int, *, dir_fd: int) -> None:
        monkeypatch.undo()
        make(path, mode, dir_fd=dir_fd)
        place.rename(place.with_name("old"))
        trap(place, target)

    monkeypatch.setattr(os, "mkdir", mkdir)
    with pytest.raises(OSError, match=r"Somebody else|symbolic links|Not a directory"):
        make_folder(str(place), 0o700, (12345, 12345))
    assert 12345 not in {path.stat().st_uid for path in tmp_path.rglob("*")}


def test_place_is_private(tmp_path: Path) -> None:
    place = tmp_path / "vtpm-cuse" / "vtpm0"
    make_folder(str(place), 0o700)
    check_private(str(place), os.getuid())
    with pytest.raises(PermissionError, match=f"belongs to user {os.getuid()}"):
        check_private(str(place), 12345)
    place.chmod(0o777)
    with pytest.raises(PermissionError, match="written to by everybody"):
        check_private(str(place), os.getuid())
    place.chmod(0o700)
    place.parent.chmod(0o777)
    with pytest.raises(PermissionError, match="written to by everybody"):
        check_private(str(place), os.getuid())


def test_place_is_no_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "vtpm0").symlink_to("elsewhere")
    with pytest.raises(OSError, match=r"symbolic links|Not a directory"):
        check_private(str(tmp_path / "vtpm0"), os.getuid())


@needs_root
def test_socket_is_given_away_and_nothing_else(tmp_path: Path) -> None:
    path, file = tmp_path / "socket", tmp_path / "file"
    file.write_text("root's")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        give_socket(str(path), 12345, -1)
        assert (path.stat().st_uid, path.stat().st_gid) == (12345, os.getgid())
    for link in (os.symlink, os.link):
        path.unlink()
        link(file, path)
        with pytest.raises(OSError, match="Somebody else has put something there"):
            give_socket(str(path), 12345, 12345)
        assert file.stat().st_uid == 0
        assert path.lstat().st_uid == 0


def _write(fd: int) -> None:
    with open(fd, "wb") as file:
        file.write(b"key")
