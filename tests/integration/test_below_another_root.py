"""--chroot: nothing is taken from below the new root but what the options name."""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from tests.support import commands as tpm
from tests.support import sockets as s
from tests.support.files import open_files
from tests.support.private import lines_with
from tests.support.waiting import PATIENCE_SECONDS, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    Connect = Callable[[], s.Client]

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="needs root")

RANDOM: Final = tpm.get_random(8)
_OPEN: Final = 0x20
_ONLY_FOLDERS: Final = 0x0100_0000
_EVENT: Final = struct.Struct("=iIII")


class Watch:
    """Which files below a folder are opened, by inotify(7)."""

    def __init__(self, folder: Path) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        self._root = folder
        self._folders = {}
        for path in (folder, *folder.glob("**/")):
            number = self._libc.inotify_add_watch(
                self._fd, os.fsencode(path), _OPEN | _ONLY_FOLDERS
            )
            self._folders[number] = path

    def close(self) -> None:
        os.close(self._fd)

    def opened(self) -> set[str]:
        """Names of files so far, from the folder on."""
        found: set[str] = set()
        while True:
            try:
                data = os.read(self._fd, 1 << 16)
            except BlockingIOError:
                return found
            while data:
                number, _, _, size = _EVENT.unpack_from(data)
                name = data[_EVENT.size : _EVENT.size + size].rstrip(b"\0").decode()
                path = self._folders[number] / name
                if path.is_file() or (name and not path.is_dir()):
                    found.add(str(path.relative_to(self._root)))
                data = data[_EVENT.size + size :]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with a source of random bytes, and room for the state."""
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    root = tmp_path / "root"
    (root / "dev").mkdir(parents=True)
    (root / "state").mkdir()
    for folder in (root, root / "state"):
        os.chown(folder, 65534, 65534)
    os.mknod(root / "dev/urandom", 0o20666, os.makedev(1, 9))
    return root


def plant(root: Path, tell: Path) -> None:
    """Libraries that tell when they are loaded, wherever a C library may look for them."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("no gcc")
    source = root / "planted.c"
    source.write_text(
        "#include <fcntl.h>\n#include <unistd.h>\n"
        "__attribute__((constructor)) static void tell(void)"
        ' { close(open("/loaded", O_CREAT | O_WRONLY, 0600)); }\n'
    )
    library = root / "planted.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    names = ("libnss_planted.so.2", "libnss_files.so.2", "libkeyutils.so.1", "libseccomp.so.2")
    for folder in ("lib", "lib/x86_64-linux-gnu", "usr/lib", "usr/lib/x86_64-linux-gnu", "lib64"):
        (root / folder).mkdir(parents=True)
        for name in (*names, "libtpms.so.0", "libcrypto.so.3"):
            shutil.copy(library, root / folder / name)
    (root / "etc").mkdir()
    (root / "etc/nsswitch.conf").write_text("passwd: planted files\ngroup: planted files\n")
    (root / "etc/passwd").write_text("nobody:x:0:0::/:/bin/sh\n")
    (root / "etc/group").write_text("nogroup:x:0:\n")
    (root / "etc/ld.so.preload").write_text("/lib/libkeyutils.so.1\n")
    (root / "etc/localtime").write_bytes(b"")
    (root / "etc/ssl").mkdir()
    (root / "etc/ssl/openssl.cnf").write_text("openssl_conf = x\n")
    assert not tell.exists()


@contextmanager
def socket_server(
    root: Path, *words: str, more_fds: Sequence[int] = ()
) -> Iterator[tuple[int, Connect]]:
    start = [*s.OURS, "socket", "--tpm2", "--chroot", str(root), "--tpmstate", "dir=/state"]
    start += ["--ctrl", "type=unixio,path=/c", "--server", "type=unixio,path=/d,uid=nobody"]
    start += ["--pid", "file=/pid", "--log", "file=/log", *s.RUNNING, "--daemon", *words]
    done = subprocess.run(
        start,
        check=False,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        env=s.environment(),
        pass_fds=more_fds,
    )
    assert (done.returncode, done.stderr) == (0, ""), (root / "log").read_text()
    pid = int((root / "pid").read_text())
    yield pid, lambda: s.connect(root / "d")
    os.kill(pid, signal.SIGTERM)


@contextmanager
def stream_server(
    root: Path, *words: str, more_fds: Sequence[int] = ()
) -> Iterator[tuple[int, Connect]]:
    """``swtpm chardev`` on a descriptor."""
    ours, theirs = socket.socketpair()
    fd = theirs.fileno()
    start = [*s.OURS, "chardev", "--tpm2", "--chroot", str(root), "--tpmstate", "dir=/state"]
    start += ["--fd", str(fd), "--pid", "file=/pid", "--log", "file=/log", *s.RUNNING, *words]
    fds = [fd, *more_fds]
    with subprocess.Popen(start, pass_fds=fds, env=s.environment()) as process, ours, theirs:
        theirs.close()
        wait_until(
            lambda: (root / "pid").exists() and (root / "pid").read_text() != "",
            "the pid file",
            process=process,
            log=root / "log",
        )
        yield process.pid, lambda: s.Client(ours.dup())
        process.terminate()
        assert process.wait(PATIENCE_SECONDS) == 0


SERVERS: Final = [socket_server, stream_server]


def use(connect: Connect) -> None:
    with connect() as client:
        assert tpm.code_of(client.command(RANDOM)) == 0


@pytest.mark.parametrize("server", SERVERS)
def test_a_folder_with_nothing_but_random_bytes(
    server: Callable[..., AbstractContextManager[tuple[int, Connect]]], root: Path
) -> None:
    """No /proc, no /etc, no /dev/null."""
    with server(root) as (pid, connect):
        assert (root / "pid").read_text() == str(pid)
        assert os.readlink(f"/proc/{pid}/root") == str(root)
        use(connect)
    wait_until(lambda: not (root / "pid").exists(), "its end")


@pytest.mark.parametrize("server", SERVERS)
def test_what_helps_the_server_is_not_taken_for_it(
    server: Callable[..., AbstractContextManager[tuple[int, Connect]]], root: Path
) -> None:
    """Callers look for it by its command line, and find one process."""
    with server(root) as (pid, connect):
        use(connect)
        remover = f"vtpm-remover: clears up after {pid}"
        wait_until(lambda: remover in lines_with(remover).values(), "a name of its own")
        assert [*lines_with(str(root))] == [pid]


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("more", [(), ("--runas", "nobody"), ("--key", "keyring=no-such-key")])
def test_nothing_is_read_or_run_that_lies_there(
    server: Callable[..., AbstractContextManager[tuple[int, Connect]]],
    more: tuple[str, ...],
    root: Path,
) -> None:
    plant(root, root / "loaded")
    watch = Watch(root)
    try:
        if "--key" in more:
            with pytest.raises(AssertionError, match="no-such-key"), server(root, *more):
                pass
        else:
            with server(root, *more) as (pid, connect):
                use(connect)
                (uids,) = [
                    line.split()[1:]
                    for line in Path(f"/proc/{pid}/status").read_text().splitlines()
                    if line.startswith("Uid:")
                ]
                assert set(uids) == ({"65534"} if more else {"0"})
            wait_until(lambda: not Path(f"/proc/{pid}").exists(), "its end")
        found = {name for name in watch.opened() if not name.startswith("state/")}
    finally:
        watch.close()
    assert not (root / "loaded").exists()
    own = r"log|pid|\.pid\.[0-9a-f]{16}|c|d|dev/urandom"  # a pid file has that name at first
    assert {name for name in found if not re.fullmatch(own, name)} == set()


@pytest.mark.parametrize("planted", [False, True], ids=["no-proc", "another-proc"])
@pytest.mark.parametrize("server", SERVERS)
def test_what_the_caller_left_open_is_closed(
    server: Callable[..., AbstractContextManager[tuple[int, Connect]]],
    planted: bool,
    root: Path,
    tmp_path: Path,
) -> None:
    """Nobody there can say who holds a lock; what holds one was known before."""
    left, locked = tmp_path / "left", tmp_path / "locked"
    if planted:  # it shows nothing that is open, and a lock on all of it
        (root / "proc/self/fd").mkdir(parents=True)
        (root / "proc/self/fdinfo").mkdir()
        for number in range(3, 64):
            (root / f"proc/self/fdinfo/{number}").write_text("lock:\t1: FLOCK\n")
    with left.open("w") as file, left.open() as to_read, locked.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        fds = [file.fileno(), to_read.fileno(), held.fileno()]
        with server(root, more_fds=fds) as (pid, connect):
            use(connect)
            there = set(open_files(pid).values())
    assert str(left) not in there
    assert str(locked) in there


def test_the_trap_works(root: Path) -> None:
    """So that the test above can fail."""
    plant(root, root / "loaded")
    watch = Watch(root)
    look = "import os, pwd; os.chroot(os.sys.argv[1]); os.chdir('/'); pwd.getpwnam('nobody')"
    try:
        subprocess.run(["/usr/bin/python3", "-c", look, root], check=False)
        assert "etc/nsswitch.conf" in watch.opened()
    finally:
        watch.close()
    assert (root / "loaded").exists()


def test_a_fuse_mount_has_no_other_root() -> None:
    """It would take a program from there, and run it as root."""
    done = subprocess.run(
        [*s.OURS, "fuse", "-n", "x", "--chroot", "/"],
        check=False,
        capture_output=True,
        text=True,
        env=s.environment(),
    )
    assert done.returncode == 1
    assert "chroot" in done.stderr
