"""A FUSE mount with a device file in it: how it is made and ended.

fusermount3 mounts and unmounts, as any user may have it; what it hands over is
the descriptor that gives the kernel's requests. The protocol on it is that of
/dev/cuse with a few requests more, see `proto.fuse`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import select
import socket
import stat
import subprocess
import time
from typing import Final

import trio

from vtpm_cuse.acquire.keeper import Keeper
from vtpm_cuse.errors import NO_PROC, FrontendError
from vtpm_cuse.files import make_folder
from vtpm_cuse.programs import find_program
from vtpm_cuse.proto.device import READ_BUFFER_SIZE
from vtpm_cuse.proto.fuse import init_reply

FUSE_PATH: Final = "/dev/fuse"

_FUSE_DEVICE: Final = os.makedev(10, 229)
_FUSERMOUNT: Final = "fusermount3"
_OPTIONS: Final = "fsname=swtpm,subtype=vtpm,default_permissions,nosuid,nodev,noexec"
_KIND: Final = "fuse.vtpm"
_FD_SIZE: Final = 1
_LEAVING_SECONDS: Final = 2.0
_TRY_AGAIN_SECONDS: Final = 0.02
_COMMAND_SECONDS: Final = 30


class FuseMount:
    """One mount. Nothing is done before `take_folder`, which comes first.

    Args:
        folder: Absolute path of an empty folder; made if there is none, and then removed again.
        allow_other: Other users may use it too.
        read_only: Nobody writes to it.
    """

    def __init__(self, folder: str, *, allow_other: bool = False, read_only: bool = False) -> None:
        self._folder = os.path.realpath(folder)
        self._options = _OPTIONS + ",allow_other" * allow_other + ",ro" * read_only
        self._keeper: Keeper | None = None
        self._lock = -1
        self._made = False
        self._device = b""
        self.fd = -1
        self._buffer = memoryview(bytearray(READ_BUFFER_SIZE))
        self.buffers = [self._buffer]

    @classmethod
    def adopt(cls, folder: str, fd: int) -> FuseMount:
        """What somebody else has mounted and will unmount: *fd*, ours now, gives its requests."""
        mount = cls(folder)
        mount.fd = fd
        os.set_blocking(fd, False)
        return mount

    def take_folder(self, *, keeper: bool = True) -> None:
        """Makes sure that the folder can be mounted on, and is ours alone from now on.

        Args:
            keeper: A process of its own unmounts it, however this one ends; else `close` does.

        Raises:
            FrontendError: FUSE is not to be had here, or the folder not to be used.
        """
        _check_fuse()
        self._lock = self._locked_folder()
        if not keeper:
            return
        # It holds the lock too, so a successor waits for it.
        try:
            self._keeper = Keeper(self._clear_up, {self._lock})
        except OSError:
            self._clear_up(b"")
            raise

    def _locked_folder(self) -> int:
        """Locks the folder below the mount, so that two never mount over each other.

        The one before may be about to leave, or have removed it since it was opened; then it is
        made again.
        """
        deadline = time.monotonic() + _LEAVING_SECONDS
        while True:
            _remove_stale(self._folder)
            lock = self._open_folder()
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(lock), os.stat(self._folder)):
                    _check_empty(lock, self._folder)
                    return lock
            except FileNotFoundError:
                pass
            except BlockingIOError:
                if time.monotonic() > deadline:
                    os.close(lock)
                    raise _in_use(self._folder) from None
                time.sleep(_TRY_AGAIN_SECONDS)
            except BaseException:
                os.close(lock)
                raise
            os.close(lock)

    def _open_folder(self) -> int:
        try:
            if not os.path.isdir(self._folder):
                make_folder(self._folder, 0o700)
                self._made = True
            return os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as exc:
            if os.path.exists(self._folder) and not os.path.isdir(self._folder):
                raise FrontendError(f"{self._folder} is no directory") from None
            reason = f"Could not use {self._folder}: {exc.strerror}"
            raise FrontendError(reason, "choose another") from exc

    def mount(self) -> None:
        """Raises FrontendError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with ours, theirs:
            done = _fusermount("-o", self._options, "--", self._folder, channel=theirs)
            theirs.close()
            if done.returncode:
                raise FrontendError(f"Could not mount on {self._folder}: {_said(done)}")
            _, fds, _, _ = socket.recv_fds(ours, _FD_SIZE, 1)
        if not fds:
            raise FrontendError(f"{_FUSERMOUNT} gave no descriptor of the mount")
        self.fd = fds[0]
        os.set_inheritable(self.fd, False)  # recv_fds() takes flags, and does nothing with them
        os.set_blocking(self.fd, False)
        self._device = (_mounted_on(self._folder) or "gone").encode()
        if self._keeper is not None:
            self._keeper.note(self._device)

    async def answer_init(self) -> None:
        """The first request; once it is answered, clients are served.

        Raises:
            FrontendError: The kernel speaks another protocol.
        """
        await trio.lowlevel.wait_readable(self.fd)
        self.answer_init_now()

    def answer_init_now(self) -> None:
        """As above; it is on its way as soon as there is a mount, and is waited for."""
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        poll.poll()
        size = os.readv(self.fd, self.buffers)
        os.write(self.fd, init_reply(self._buffer[:size]))

    def close(self) -> None:
        """Unmounts, if that has not been done by somebody else; again is harmless."""
        if self.fd >= 0:
            os.close(self.fd)  # first: no client can make fusermount3 wait any more
            self.fd = -1
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
        if self._keeper is not None:
            self._keeper.end()
            self._keeper = None
        elif self._device:
            self._clear_up(self._device)
        self._device = b""

    def give_away(self) -> int:
        """The descriptor, for somebody else to serve; what is mounted is still ours to end."""
        fd, self.fd = self.fd, -1
        return fd

    def _clear_up(self, device: bytes) -> None:
        """In the keeper, when nobody serves the mount any more: *device* is the number it had."""
        if device and (_mounted_on(self._folder) or "").encode() == device:
            _fusermount("-u", "-z", "-q", "--", self._folder)
        if self._made:
            with contextlib.suppress(OSError):
                os.rmdir(self._folder)


def mounts_below(folder: str) -> dict[str, str]:
    """Where this program's kind of mounts are, somewhere below a folder, with their device numbers.

    The paths begin with *folder*, as it is given. Raises FrontendError.
    """
    above = os.path.realpath(folder) + "/"
    lines = (line.split(" ") for line in _mounts())
    found = {_unquoted(fields[4]): fields[2] for fields in lines if _KIND in fields}
    return {
        os.path.join(folder, path.removeprefix(above)): device
        for path, device in found.items()
        if path.startswith(above)
    }


def end_mount(folder: str, device: str | None = None) -> None:
    """Ends one that a process has left; the folder goes, too. Raises FrontendError.

    Not one of another *device* number, which has taken its place.
    """
    above, name = os.path.split(folder)
    found = _mounted_on(os.path.join(os.path.realpath(above), name))  # itself may not answer
    if device not in {None, found}:
        return
    if found is not None:
        _fusermount("-u", "-z", "-q", "--", folder)
    with contextlib.suppress(OSError):
        os.rmdir(folder)


def _check_fuse() -> None:
    if not os.path.exists(FUSE_PATH):
        raise FrontendError(f"fuse: {FUSE_PATH} not found", "try 'modprobe fuse' as root first")
    found = os.stat(FUSE_PATH)
    if not stat.S_ISCHR(found.st_mode) or found.st_rdev != _FUSE_DEVICE:
        reason = f"fuse: {FUSE_PATH} is something else than the kernel's device"
        raise FrontendError(
            reason, f"as root, 'rm {FUSE_PATH} && mknod -m 666 {FUSE_PATH} c 10 229'"
        )
    if not os.access(FUSE_PATH, os.R_OK | os.W_OK):
        raise FrontendError(f"fuse: no right to use {FUSE_PATH}", "ask for its mode 0666")


def _remove_stale(folder: str) -> None:
    """Unmounts what a killed process has left. Raises FrontendError where something is mounted."""
    if _mounted_on(folder) is None:
        return
    try:
        os.stat(folder)
    except OSError as exc:
        if exc.errno not in {errno.ENOTCONN, errno.ECONNABORTED}:
            raise FrontendError(f"Could not use {folder}: {exc.strerror}") from exc
    else:
        raise _in_use(folder)
    done = _fusermount("-u", "-z", "--", folder)
    if done.returncode and _mounted_on(folder) is not None:  # else its keeper was faster
        raise FrontendError(f"Could not end the dead mount on {folder}: {_said(done)}")


def _check_empty(fd: int, folder: str) -> None:
    if _mounted_on(folder) is not None:  # by another one, just now
        raise _in_use(folder)
    if os.listdir(fd):
        raise FrontendError(f"{folder} is not empty", "choose another")


def _in_use(folder: str) -> FrontendError:
    return FrontendError(f"{folder} is in use: something is mounted there", "choose another")


def _mounted_on(folder: str) -> str | None:
    """The device number of what is mounted on a folder without links, without touching it."""
    found = None
    for line in _mounts():
        fields = line.split(" ")
        if _unquoted(fields[4]) == folder:
            found = fields[2]  # the last one is on top
    return found


def _unquoted(path: str) -> str:
    """As it is in the table of mounts."""
    return re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), path)


def _mounts() -> list[str]:
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
            return table.readlines()
    except FileNotFoundError as exc:
        raise FrontendError(*NO_PROC) from exc


def _fusermount(
    *arguments: str, channel: socket.socket | None = None
) -> subprocess.CompletedProcess[str]:
    program = find_program(_FUSERMOUNT)
    if program is None:
        raise FrontendError(f"fuse: {_FUSERMOUNT} not found", "install the package fuse3")
    environment = {**os.environ, "LC_ALL": "C"}
    if channel is not None:
        environment["_FUSE_COMMFD"] = str(channel.fileno())
    try:
        return subprocess.run(  # noqa: S603  arguments of ours
            [program, *arguments],
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="backslashreplace",
            env=environment,
            pass_fds=() if channel is None else (channel.fileno(),),
            timeout=_COMMAND_SECONDS,
        )
    except subprocess.TimeoutExpired as exc:
        raise FrontendError(f"{_FUSERMOUNT} did not end in {_COMMAND_SECONDS} s") from exc


def _said(done: subprocess.CompletedProcess[str]) -> str:
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"{_FUSERMOUNT} ended with status {done.returncode}"
