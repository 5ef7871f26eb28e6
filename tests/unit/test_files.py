"""Files of the tools: what is put in the way, whose they are, and no wait for anybody."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.support.files import umask
from tests.support.processes import in_child
from vtpm_cuse import files

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def make_link(path: Path) -> None:
    (path.parent / "target").write_bytes(b"target")
    path.symlink_to("target")


def make_loose_link(path: Path) -> None:
    path.symlink_to("nowhere")


def make_socket(path: Path) -> None:
    os.mknod(path, stat.S_IFSOCK | 0o600)


IN_THE_WAY: list[tuple[Callable[[Path], object], str]] = [
    (make_link, "symbolic link"),
    (make_loose_link, "symbolic link"),
    (os.mkfifo, "pipe"),
    (os.mkdir, "Is a directory"),
    (make_socket, "socket"),
]


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(("make", "said"), IN_THE_WAY)
def test_what_is_in_the_way_of_an_output_is_named_and_left(
    make: Callable[[Path], object], said: str, streams: bool, tmp_path: Path
) -> None:
    path = tmp_path / "out"
    make(path)
    before = {found.name: found.lstat().st_ino for found in tmp_path.iterdir()}
    with pytest.raises(OSError, match=said):
        files.write_output(str(path), b"new", 0o644, streams=streams)
    assert {found.name: found.lstat().st_ino for found in tmp_path.iterdir()} == before
    if "target" in before:
        assert (tmp_path / "target").read_bytes() == b"target"
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(("make", "said"), IN_THE_WAY)
def test_what_is_in_the_way_of_a_log_is_named(
    make: Callable[[Path], object], said: str, tmp_path: Path
) -> None:
    make(tmp_path / "log")
    with pytest.raises(OSError, match=said):
        files.open_log(str(tmp_path / "log"), 0o640)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, make_loose_link, make_socket])
def test_reading_never_waits_for_what_is_in_the_way(
    make: Callable[[Path], object], streams: bool, tmp_path: Path
) -> None:
    make(tmp_path / "in")
    with pytest.raises(OSError, match="in"):
        files.read_small(str(tmp_path / "in"), streams=streams)


def test_a_pipe_and_a_descriptor_that_the_user_names_are_read_and_written(tmp_path: Path) -> None:
    for name in ("/dev/fd/{}", "/proc/self/fd/{}"):
        read_end, write_end = os.pipe()
        files.write_output(name.format(write_end), b"through", 0o600, streams=True)
        os.close(write_end)
        assert files.read_small(name.format(read_end), streams=True) == b"through"
        os.close(read_end)
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    files.write_output(str(tmp_path / "pipe"), b"seeds", 0o600, streams=True)
    assert os.read(reader, 99) == b"seeds"
    os.close(reader)
    files.write_output("/dev/null", b"gone", 0o600, streams=True)
    with pytest.raises(OSError, match="No space"):
        files.write_output("/dev/full", b"gone", 0o600, streams=True)
    with pytest.raises(OSError, match="device"):
        files.write_output("/dev/null", b"gone", 0o600)
    with pytest.raises(OSError, match="device"):
        files.read_small("/dev/null")


@pytest.mark.parametrize("mask", [0, 0o027, 0o777])
def test_no_umask_counts(mask: int, tmp_path: Path) -> None:
    with umask(mask):
        files.make_folders(str(tmp_path / "a" / "b" / "c"), 0o750)
        files.write_output(str(tmp_path / "a" / "out"), b"x", 0o640)
        os.close(files.open_log(str(tmp_path / "a" / "log"), 0o640))
    modes = [mode_of(tmp_path / name) for name in ("a", "a/b", "a/b/c", "a/out", "a/log")]
    assert modes == [0o755, 0o755, 0o750, 0o640, 0o640]


@needs_root
@pytest.mark.parametrize("mask", [0, 0o027, 0o777])
def test_what_is_replaced_hands_on_owner_group_and_mode(mask: int, tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"old")
    os.chown(path, NOBODY, 1234)
    path.chmod(0o4664)
    with umask(mask):
        files.write_output(str(path), b"new", 0o600)
    found = path.stat()
    assert path.read_bytes() == b"new"
    assert (found.st_uid, found.st_gid, mode_of(path)) == (NOBODY, 1234, 0o664)


@needs_root
def test_what_root_makes_in_a_users_folder_is_the_users_where_it_is_to_be(tmp_path: Path) -> None:
    os.chown(tmp_path, NOBODY, 1234)
    files.write_output(str(tmp_path / "roots"), b"x", 0o600)
    files.write_output(str(tmp_path / "users"), b"x", 0o600, of_folder=True)
    files.make_folders(str(tmp_path / "a" / "b"), 0o700, of_folder=True)
    found = [(tmp_path / name).stat() for name in ("roots", "users", "a", "a/b")]
    owner = (NOBODY, 1234)
    assert [(one.st_uid, one.st_gid) for one in found] == [(0, 0), owner, owner, owner]


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A file that is mounted from elsewhere."""
    (tmp_path / "source").write_bytes(b"old content")
    (tmp_path / "place").touch()
    words: list[str | Path] = ["mount", "--bind", tmp_path / "source", tmp_path / "place"]
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs mount: {done.stderr.strip()}")
    yield tmp_path / "place"
    subprocess.run(["umount", tmp_path / "place"], check=True)


def test_a_mounted_file_is_written_in_place(mounted: Path) -> None:
    files.write_output(str(mounted), b"new", 0o600)
    assert mounted.read_bytes() == (mounted.parent / "source").read_bytes() == b"new"
    assert sorted(path.name for path in mounted.parent.iterdir()) == ["place", "source"]


def test_a_mounted_file_with_another_name_is_left(mounted: Path) -> None:
    """It may be one that the user could not write to by that name."""
    os.link(mounted.parent / "source", mounted.parent / "other")
    with pytest.raises(OSError, match="busy"):
        files.write_output(str(mounted), b"new", 0o600)
    assert mounted.read_bytes() == b"old content"


@needs_root
def test_a_file_is_written_where_its_folder_may_not_be(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "out"
    path.parent.mkdir()
    path.write_bytes(b"old content")
    os.chown(path, NOBODY, NOBODY)

    @in_child
    def write() -> None:
        os.chdir(path.parent)
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        files.write_output("out", b"new", 0o600)
        with pytest.raises(PermissionError):
            files.write_output("another", b"new", 0o600)

    write()
    assert path.read_bytes() == b"new"


@needs_root
@pytest.mark.parametrize("make", [make_link, os.mkfifo, lambda path: path.write_bytes(b"theirs")])
def test_nobody_gets_an_output_by_being_there_first(
    make: Callable[[Path], object], tmp_path: Path
) -> None:
    """In a folder as /tmp, whatever the kernel is set to."""
    tmp_path.chmod(0o1777)
    path = tmp_path / "state"
    make(path)
    os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
    inode = path.lstat().st_ino
    with pytest.raises(PermissionError, match="somebody else's"):
        files.write_output(str(path), b"seeds", 0o600, streams=True)
    assert path.lstat().st_ino == inode


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EIO])
def test_a_folder_that_cannot_be_flushed_is_an_error_only_if_something_is_lost(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def fsync(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(number, os.strerror(number))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    failed = 0
    try:
        files.write_output(str(tmp_path / "out"), b"new", 0o600)
    except OSError as exc:
        failed = exc.errno or -1
    assert failed == (errno.EIO if number == errno.EIO else 0)
    assert (tmp_path / "out").read_bytes() == b"new"


@needs_root
def test_whose_hand_is_in_a_path(tmp_path: Path) -> None:
    roots, users = tmp_path / "roots", tmp_path / "users"
    shared, open_to_all = tmp_path / "shared", tmp_path / "open"
    for folder in (roots, users, shared, open_to_all):
        folder.mkdir()
        (folder / "f").touch()
    os.chown(users, NOBODY, NOBODY)
    shared.chmod(0o1777)
    open_to_all.chmod(0o777)
    (roots / "to_users").symlink_to(users / "f")
    (roots / "by_users").symlink_to("../users/../roots/f")
    (roots / "fine").symlink_to("f")
    (roots / "loop").symlink_to("loop")
    (shared / "theirs").touch()
    os.chown(shared / "theirs", NOBODY, NOBODY)
    (roots / "group").touch()
    os.chown(roots / "group", 0, 1234)
    (roots / "group").chmod(0o664)
    wanted = {
        roots / "f": None,
        roots / "fine": None,
        roots / "not there": None,
        shared / "f": None,
        users / "f": users,
        open_to_all / "f": open_to_all,
        shared / "theirs": shared / "theirs",
        roots / "to_users": users,
        roots / "by_users": users,
        roots / "loop": roots / "loop",
        roots / "group": roots / "group",
    }
    found = {path: files.untrusted_part(str(path)) for path in wanted}
    assert found == {path: str(part) if part else None for path, part in wanted.items()}
