"""What the kernel tests stand on: a server on a real device, raw PTM requests, events to wait for.

PTM ioctl numbers and structures are written out as literals here, so that a
mistake in the package cannot cancel out.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import os
import random
import select
import signal
import struct
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

import pytest

from tests.support import waiting, zygote

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from tests.support.zygote import Forked

ROOT: Final = Path(__file__).resolve().parents[2]
PROGRAMS: Final = Path(sys.executable).parent
SWTPM_CUSE: Final = str(PROGRAMS / "swtpm-cuse")
OUR_IOCTL: Final = str(PROGRAMS / "swtpm_ioctl")
PEER_IOCTL: Final = "/usr/bin/swtpm_ioctl"

PATIENCE: Final = zygote.PATIENCE

PTM_GET_CAPABILITY: Final = 0x80085000
PTM_INIT: Final = 0xC0045001
PTM_SHUTDOWN: Final = 0x80045002
PTM_GET_TPMESTABLISHED: Final = 0x80085003
PTM_SET_LOCALITY: Final = 0xC0045004
PTM_HASH_START: Final = 0x80045005
PTM_HASH_DATA: Final = 0xD0045006
PTM_HASH_END: Final = 0x80045007
PTM_CANCEL_TPM_CMD: Final = 0x80045008
PTM_STORE_VOLATILE: Final = 0x80045009
PTM_RESET_TPMESTABLISHED: Final = 0xC004500A
PTM_GET_STATEBLOB: Final = 0xCC10500B
PTM_SET_STATEBLOB: Final = 0xCC0C500C
PTM_STOP: Final = 0x8004500D
PTM_GET_CONFIG: Final = 0x8008500E
PTM_SET_DATAFD: Final = 0x8004500F
PTM_SET_BUFFERSIZE: Final = 0xC0105010
PTM_GET_INFO: Final = 0xCC105011
PTM_LOCK_STORAGE: Final = 0xC0045012

LIBC: Final = ctypes.CDLL(None, use_errno=True)


def needs(condition: bool, reason: str) -> None:
    """Skips with *reason* unless *condition*; in CI and in the lab everything must be there."""
    if condition:
        return
    if os.environ.get("CI") or "LAB_SCRATCH" in os.environ:
        pytest.fail(f"{reason} (must not be skipped in CI or in the lab)", pytrace=False)
    pytest.skip(reason)


def seeded(seed: int) -> random.Random:
    """Random numbers that are the same in every run."""
    return random.Random(seed)  # noqa: S311


# -- programs -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Done:
    """A program that has ended."""

    argv: tuple[str, ...]
    status: int
    stdout: str
    stderr: str


def run(
    *argv: str | Path,
    status: int | None = 0,
    stdin: bytes = b"",
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    user: str | None = None,
) -> Done:
    """Runs a program and asserts its exit status (None: any)."""
    words = tuple(str(word) for word in argv)
    if zygote.warm and user is None and _is_ours(words[0]):
        ended, out, err = zygote.warm[-1].run(words, stdin, env, cwd)
    else:
        done = subprocess.run(
            words,
            check=False,
            input=stdin,
            capture_output=True,
            timeout=PATIENCE,
            env={**os.environ, **env} if env else None,
            cwd=cwd,
            user=user,
        )
        ended, out, err = done.returncode, done.stdout, done.stderr
    result = Done(words, ended, out.decode(errors="replace"), err.decode(errors="replace"))
    assert status is None or result.status == status, result
    return result


def popen(*words: str) -> subprocess.Popen[bytes] | Forked:
    """Starts a program with nothing to read, and with pipes behind what it says."""
    if zygote.warm and _is_ours(words[0]):
        return zygote.warm[-1].popen(words)
    null, pipe = subprocess.DEVNULL, subprocess.PIPE
    return subprocess.Popen(words, stdin=null, stdout=pipe, stderr=pipe)


def _is_ours(program: str) -> bool:
    return os.path.dirname(program) == str(PROGRAMS)


def processes(word: str) -> list[int]:
    """Those with such a word on their command line, as ps shows them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word.encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


# -- waiting ------------------------------------------------------------------------------


wait_until: Final = functools.partial(waiting.wait_until, seconds=PATIENCE)


def wait_readable(fd: int, seconds: float = PATIENCE) -> None:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    assert poll.poll(seconds * 1000), f"nothing to read within {seconds} s"


def wait_exit(pidfd: int, seconds: float = PATIENCE) -> None:
    """Until the process behind *pidfd* has ended."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    assert poll.poll(seconds * 1000), f"the process still runs after {seconds} s"


def wait_child(pid: int, seconds: float = PATIENCE) -> int:
    """Waits for a child; returns its exit code, or minus the signal that ended it."""
    pidfd = os.pidfd_open(pid)
    try:
        wait_exit(pidfd, seconds)
    finally:
        os.close(pidfd)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


READ, POLL = "0", "7"  # numbers of system calls on x86-64
_SELECT, _PSELECT, _EPOLL_WAIT, _IOCTL = "23", "270", "232", "16"


def wait_blocked(thread_id: int, *calls: str) -> None:
    """Until a thread sleeps in one of the system calls, by default in any that waits."""
    path = Path(f"/proc/{thread_id}/syscall")
    wanted = calls or (READ, POLL, _SELECT, _PSELECT, _EPOLL_WAIT, _IOCTL)
    wait_until(lambda: path.read_text().split()[0] in wanted, f"{thread_id} blocks")


def wait_for_line(path: Path, text: str, process: subprocess.Popen[bytes]) -> None:
    """Until a file holds *text*; fails at once when *process* ends before."""
    wait_until(
        lambda: path.exists() and text in path.read_text(),
        f"{text!r} in {path}",
        process=process,
        log=path,
    )


def _text_of(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else "(no such file)"


# -- the device ---------------------------------------------------------------------------


def exchange(fd: int, command: bytes) -> bytes:
    """One TPM command and its response."""
    assert os.write(fd, command) == len(command)
    return os.read(fd, 8192)


def ptm(fd: int, number: int, argument: bytes = b"") -> bytes:
    """A PTM ioctl; returns its whole argument afterwards."""
    size = number >> 16 & 0x3FFF
    data = bytearray(argument.ljust(size, b"\0"))
    assert fcntl.ioctl(fd, number, data, True) == 0
    return bytes(data)


def ptm_result(fd: int, number: int, argument: bytes = b"") -> int:
    """The result in the first four bytes of a PTM ioctl's answer."""
    return int(struct.unpack_from("=I", ptm(fd, number, argument))[0])


def u32(*values: int) -> bytes:
    """Host-endian, as ioctl arguments are."""
    return struct.pack(f"={len(values)}I", *values)


@contextmanager
def opened(path: Path, flags: int = os.O_RDWR) -> Iterator[int]:
    """A file descriptor of the device, whose node the kernel makes a moment before the device."""
    fds: list[int] = []

    def is_there() -> bool:
        try:
            fds.append(os.open(path, flags))
        except OSError as exc:
            if exc.errno != errno.ENXIO:
                raise
        return bool(fds)

    waiting.wait_until(is_there, f"{path} has a device behind its node")
    try:
        yield fds[0]
    finally:
        os.close(fds[0])


def errno_from(call: Callable[[], object]) -> int:
    """The errno that *call* fails with; 0 when it does not fail."""
    try:
        call()
    except OSError as exc:
        return exc.errno or -1
    return 0


@contextmanager
def child(body: Callable[[], None]) -> Iterator[int]:
    """A forked process that runs *body*; it is killed at the end, if it still runs."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            body()
            status = 0
        finally:
            os._exit(status)
    try:
        yield pid
    finally:
        try:
            os.kill(pid, signal.SIGKILL)
            wait_child(pid)
        except (ProcessLookupError, ChildProcessError):
            pass


class Background:
    """A function in a thread, whose result or exception is handed over."""

    def __init__(self, body: Callable[[], object]) -> None:
        self._body = body
        self._result: object = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._body()
        except BaseException as exc:
            self._error = exc

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    @property
    def native_id(self) -> int:
        assert self._thread.native_id is not None
        return self._thread.native_id

    def result(self, seconds: float = PATIENCE) -> object:
        self._thread.join(seconds)
        assert not self._thread.is_alive(), f"still running after {seconds} s"
        if self._error is not None:
            raise self._error
        return self._result


# -- the server ---------------------------------------------------------------------------


@dataclass
class Server:
    """``swtpm-cuse -n NAME`` in the background, on a state folder and a log of its own.

    Attributes:
        name: The device is /dev/NAME.
        folder: Holds state, log and pid file.
        flags: Of ``--flags``; empty for none.
        tpm2: TPM 2.0 rather than 1.2.
        more: Further arguments.
        state: State folder.
    """

    name: str
    folder: Path
    flags: str = "not-need-init,startup-clear"
    tpm2: bool = True
    more: tuple[str, ...] = ()
    state: Path = field(default=Path())
    _pidfd: int = -1
    program: ClassVar[tuple[str, ...]] = (SWTPM_CUSE,)

    def __post_init__(self) -> None:
        if self.state == Path():
            self.state = self.folder / f"{self.name}.state"
        self.log = self.folder / f"{self.name}.log"
        self.pid_file = self.folder / f"{self.name}.pid"
        self.device = self.device_path()
        self.permall = self.state / ("tpm2-00.permall" if self.tpm2 else "tpm-00.permall")

    def device_path(self) -> Path:
        return Path("/dev") / self.name

    def waiting(self) -> int:
        """Requests that the kernel has handed to the server, or would like to, unanswered."""
        return int(Path(f"/sys/class/cuse/{self.name}/waiting").read_text())

    def run(self, *argv: str | Path, **settings: Any) -> Done:  # noqa: ANN401  as `run` takes them
        """Runs a program as the user who may use the device."""
        return run(*argv, **settings)

    @property
    def arguments(self) -> tuple[str, ...]:
        return (
            *("-n", self.name),
            *(("--tpm2",) if self.tpm2 else ()),
            *("--tpmstate", f"dir={self.state}"),
            *("--log", f"file={self.log}"),
            *("--pid", f"file={self.pid_file}"),
            *(("--flags", self.flags) if self.flags else ()),
            *self.more,
        )

    @property
    def pid(self) -> int:
        return int(self.pid_file.read_text())

    def start(self) -> Server:
        """Starts it; on return the device answers."""
        done = self.run(*self.program, *self.arguments, status=None)
        assert done.status == 0, (done, _text_of(self.log))
        self._pidfd = os.pidfd_open(self.pid)
        return self

    def fails(self, status: int, *texts: str) -> Done:
        """Starts it in vain; every text must be in what it said."""
        done = self.run(*self.program, *self.arguments, status=None)
        said = done.stderr + _text_of(self.log)
        assert done.status == status, (done, said)
        for text in texts:
            assert text in said
        assert "Traceback" not in said
        return done

    @property
    def running(self) -> bool:
        return self._pidfd >= 0

    def open(self, flags: int = os.O_RDWR) -> int:
        return os.open(self.device, flags)

    def opened(self, flags: int = os.O_RDWR) -> object:
        return opened(self.device, flags)

    def shut_down(self) -> None:
        """As ``swtpm_ioctl -s`` does, without the price of a new interpreter."""
        with opened(self.device) as fd:
            assert ptm_result(fd, PTM_SHUTDOWN) == 0

    def stop(self) -> None:
        """By PTM_SHUTDOWN; then process, node and pid file are gone."""
        self.shut_down()
        self.gone()

    def signal(self, number: int) -> None:
        signal.pidfd_send_signal(self._pidfd, number)

    def kill(self) -> None:
        """Without warning."""
        self.signal(signal.SIGKILL)
        self.gone(pid_file=True)

    def gone(self, *, pid_file: bool = False) -> None:
        """Waits until the process has ended, and checks that it left nothing behind."""
        try:
            wait_exit(self._pidfd, 30)
        finally:
            os.close(self._pidfd)
            self._pidfd = -1
        self.check_gone()
        assert self.pid_file.exists() == pid_file
        assert "Traceback" not in _text_of(self.log), _text_of(self.log)

    def check_gone(self) -> None:
        assert not self.device.exists()
        assert not Path(f"/sys/class/cuse/{self.name}").exists()

    def end(self) -> None:
        """The fixture's farewell, whatever happened before."""
        if not self.running:
            return
        try:
            self.stop()
        except BaseException:
            if self.running:
                self.signal(signal.SIGKILL)
                wait_exit(self._pidfd)
                os.close(self._pidfd)
                self._pidfd = -1
            raise

    @property
    def said(self) -> str:
        return _text_of(self.log)


def no_such_device(path: Path) -> bool:
    return errno_from(lambda: os.close(os.open(path, os.O_RDWR))) == errno.ENOENT


STARTED: Final[list[Server]] = []
"""All servers of this run, also those that have ended."""


def servers(folder: Path, kind: type[Server] = Server) -> Iterator[Callable[..., Server]]:
    """Yields what makes servers (not started yet); they end after it."""
    made: list[Server] = []

    def make(name: str, **settings: Any) -> Server:  # noqa: ANN401  as Server takes them
        made.append(kind(name, folder, **settings))
        STARTED.append(made[-1])
        return made[-1]

    yield make
    errors = []
    for server in reversed(made):
        try:
            server.end()
        except Exception as exc:
            errors.append(exc)
    if errors:
        raise errors[0]
