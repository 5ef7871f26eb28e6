"""Files and folders: what is put in the way, whose they are, and no wait for anybody."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import subprocess
import threading
from typing import TYPE_CHECKING

import pytest

from tests.support.files import umask
from tests.support.processes import in_child
from vtpm_cuse import files
from vtpm_cuse.files import check_private, give_socket, make_folder, open_to_read, open_to_write

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
        open_to_write(str(tmp_path / "log"), 0o640)
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
        make_folder(str(tmp_path / "a" / "b" / "c"), 0o750, umask=False)
        files.write_output(str(tmp_path / "a" / "out"), b"x", 0o640)
        os.close(open_to_write(str(tmp_path / "a" / "log"), 0o640, umask=False))
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
    make_folder(str(tmp_path / "a" / "b"), 0o700, of_folder=True)
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


@needs_root
@pytest.mark.parametrize("link", [False, True])
@pytest.mark.parametrize("truncate", [False, True])
def test_nobody_gets_a_log_by_being_there_first(truncate: bool, link: bool, tmp_path: Path) -> None:
    """Neither by a file of his own, nor by another name of one that is root's."""
    shared, path = tmp_path / "shared", tmp_path / "shared" / "log"
    shared.mkdir()
    shared.chmod(0o1777)
    (tmp_path / "file").write_bytes(b"old")
    if link:
        os.link(tmp_path / "file", path)
    else:
        (tmp_path / "file").rename(path)
        os.chown(path, NOBODY, NOBODY)
        path.chmod(0o666)
    with pytest.raises(PermissionError, match="remove it, or name another"):
        open_to_write(str(path), 0o600, truncate=truncate)
    assert path.read_bytes() == b"old"


def test_ones_own_log_in_a_shared_folder_is_fine(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    (tmp_path / "log").write_bytes(b"old")
    for truncate, found in ((False, b"oldx"), (True, b"x")):
        with open(open_to_write(str(tmp_path / "log"), 0o600, truncate=truncate), "wb") as log:
            log.write(b"x")
        assert (tmp_path / "log").read_bytes() == found
    with pytest.raises(IsADirectoryError):
        open_to_write(f"{tmp_path}/", 0o600)


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
        shared / "not there" / "f": shared,
        users / "not there": users,
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


@pytest.fixture(params=[0, 0o022, 0o077, 0o777], ids=["0", "022", "077", "777"])
def any_umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("has_other_end", [False, True])
def test_a_fifo_in_the_way_is_never_waited_for(has_other_end: bool, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with contextlib.ExitStack() as stack:
        if has_other_end:
            stack.callback(os.close, os.open(fifo, os.O_RDWR))
        with pytest.raises(OSError, match="it is a pipe"):
            open_to_read(str(fifo), streams=True)
        for owner in (None, (os.getuid(), os.getgid())):
            with pytest.raises(OSError, match="it is a pipe"):
                open_to_write(str(fifo), 0o600, owner)


@needs_root
def test_device_in_the_way_is_an_error(tmp_path: Path) -> None:
    device = tmp_path / "device"
    try:
        os.mknod(device, stat.S_IFCHR | 0o600, os.makedev(10, 229))  # /dev/fuse
        os.close(os.open(device, os.O_RDWR))
    except OSError as exc:
        pytest.skip(f"no device can be had here: {exc.strerror}")
    with pytest.raises(OSError, match="it is a device"):
        open_to_write(str(device), 0o600)
    with pytest.raises(OSError, match="it is a device"):
        open_to_read(str(device), streams=True)


def test_terminal_null_and_file_are_fine(tmp_path: Path) -> None:
    ours, theirs = os.openpty()
    try:
        for path in (os.ttyname(theirs), "/dev/null", str(tmp_path / "file")):
            fd = open_to_write(path, 0o600)
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
    fd = open_to_read(f"/dev/fd/{read_end}", streams=True)
    writer = threading.Thread(target=_write, args=(write_end,))
    writer.start()
    with open(fd, "rb") as file:
        assert file.read() == b"key"
    writer.join()
    os.close(read_end)


def test_a_socket_that_is_passed_is_fine() -> None:
    """As standard input may be one, which cannot be opened anew."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"key")
        theirs.shutdown(socket.SHUT_WR)
        with open(open_to_read(f"/dev/fd/{ours.fileno()}", streams=True), "rb") as file:
            assert file.read() == b"key"


def test_folders_are_never_others_to_write(any_umask: int, tmp_path: Path) -> None:
    make_folder(str(tmp_path / "a" / "b" / "state"), 0o775)
    modes = [
        stat.S_IMODE(path.stat().st_mode)
        for path in (tmp_path / "a", tmp_path / "a" / "b", tmp_path / "a" / "b" / "state")
    ]
    assert modes == [0o755 & ~any_umask | 0o700] * 3
    before = os.umask(any_umask)
    assert before == any_umask


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
