"""Programs of ours, forked from a process that has imported everything.

An interpreter's start and its imports take most of the time of a short test, in the lab seconds.
What is about a TPM or its device is tested by programs that begin here; what is about programs,
their start and their confinement, by whole ones.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import gc
import importlib
import json
import os
import pkgutil
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import traceback
from configparser import ConfigParser
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from types import TracebackType
    from typing import Self

ROOT: Final = Path(__file__).resolve().parents[2]
PROGRAMS: Final = Path(sys.executable).parent
PATIENCE: Final = 120.0
"""Seconds for anything that must happen; the lab is a dozen times slower than a plain machine."""

_REQUEST_MAX: Final = 1 << 16
_PASSED_MAX: Final = 64
_PASSED_FROM: Final = 512
"""Numbers that no descriptor of a program has, for those that come, until they get their own."""
_DESCRIPTORS_MAX: Final = 1 << 16
_STATUS: Final = struct.Struct("=i")
_NOT_OURS_TO_LOAD: Final = ("vtpm_cuse.lab", "vtpm_cuse.engine._build")
_LOADED_LATE: Final = ("pyroute2.netlink.uevent",)
"""By functions of ours, from other packages."""


def entry_points() -> dict[str, str]:
    """Of our programs, by their names."""
    config = ConfigParser(delimiters=("=",))
    config.read(ROOT / "setup.cfg")
    lines = config["options.entry_points"]["vtpm_cuse.programs"].split("\n")
    pairs = (line.split(" = ") for line in lines if line)
    return {name: module.removesuffix(":main") for name, module in pairs}


def _umask() -> int:
    """That of this process, without a moment in which it is another one."""
    found = re.search(r"^Umask:\t([0-7]+)$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1], 8)


class Forked:
    """A program that runs; as far as tests use it, a `subprocess.Popen`.

    Attributes:
        pid: Of the process, which is a child of the zygote's.
        stdout: A pipe, if it has one.
        stderr: The same.
        returncode: None before it has ended.
    """

    def __init__(self, pid: int, status: int, pipes: Sequence[IO[bytes]]) -> None:
        self.pid = pid
        self.stdout, self.stderr = pipes
        self.returncode: int | None = None
        self._status = status

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.wait()
        for pipe in (self.stdout, self.stderr):
            pipe.close()

    def poll(self) -> int | None:
        """The exit status if it has ended."""
        return self._wait(0)

    def wait(self, timeout: float = PATIENCE) -> int:
        """The exit status."""
        status = self._wait(timeout)
        if status is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
        return status

    def _wait(self, seconds: float) -> int | None:
        if self.returncode is None:
            poll = select.poll()
            poll.register(self._status, select.POLLIN)
            if poll.poll(seconds * 1000):
                (self.returncode,) = _STATUS.unpack(os.read(self._status, _STATUS.size))
                os.close(self._status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """If it runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Asks it to end."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """At once."""
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = PATIENCE) -> tuple[bytes, bytes]:
        """The rest of what it says, of which there is little, once it has ended."""
        self.wait(timeout)
        with self.stdout, self.stderr:
            return self.stdout.read(), self.stderr.read()


class Zygote:
    """Starts programs of ours, by their paths in the folder of this interpreter."""

    def __init__(self) -> None:
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._requests.settimeout(PATIENCE)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.zygote", str(theirs.fileno())],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        assert self._requests.recv(_REQUEST_MAX) == b"ready"

    def descriptors(self) -> int:
        """How many it has."""
        return len(os.listdir(f"/proc/{self._process.pid}/fd"))

    def begin(
        self,
        argv: Sequence[str],
        stdin: int,
        stdout: int,
        stderr: int,
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        pass_fds: Sequence[int] = (),
    ) -> tuple[int, int]:
        """A process' id, and what its exit status will come from."""
        request = {
            "argv": list(argv),
            "env": {**os.environ, **(env or {})},
            "cwd": str(cwd or Path.cwd()),
            "fds": [0, 1, 2, *pass_fds],
            "umask": _umask(),
        }
        status, theirs = os.pipe()
        try:
            fds = array.array("i", [stdin, stdout, stderr, *pass_fds, theirs])
            control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)]
            self._requests.sendmsg([json.dumps(request).encode()], control)
        finally:
            os.close(theirs)
        return _STATUS.unpack(self._requests.recv(_STATUS.size))[0], status

    def silent(self, argv: Sequence[str], pass_fds: Sequence[int]) -> Forked:
        """Starts one that has nothing to read and says what it says where the tests do."""
        with contextlib.ExitStack() as stack:
            null, *nothing = (stack.enter_context(open(os.devnull, "rb")) for _ in range(3))
            pid, status = self.begin(argv, null.fileno(), 1, 2, pass_fds=pass_fds)
        return Forked(pid, status, nothing)

    def popen(self, argv: Sequence[str]) -> Forked:
        """Starts one with pipes behind its standard output and error, and nothing to read."""
        with contextlib.ExitStack() as stack:
            ends = [os.pipe() for _ in range(2)]
            null = os.open(os.devnull, os.O_RDONLY)
            for fd in (null, *(end for _, end in ends)):
                stack.callback(os.close, fd)
            pid, status = self.begin(argv, null, ends[0][1], ends[1][1])
        return Forked(pid, status, [open(end, "rb") for end, _ in ends])

    def run(
        self,
        argv: Sequence[str],
        stdin: bytes = b"",
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
    ) -> tuple[int, bytes, bytes]:
        """Runs one; returns its exit status, and what it said on standard output and error."""
        with contextlib.ExitStack() as stack:
            files = [os.memfd_create("standard file") for _ in range(3)]
            for fd in files:
                stack.callback(os.close, fd)
            os.pwrite(files[0], stdin, 0)
            pid, status = self.begin(argv, *files, env=env, cwd=cwd)
            nothing = [stack.enter_context(open(os.devnull, "rb")) for _ in range(2)]
            ended = Forked(pid, status, nothing).wait()
            said = [os.pread(fd, os.fstat(fd).st_size, 0) for fd in files[1:]]
        return ended, said[0], said[1]

    def close(self) -> None:
        """Ends it, and no program of its."""
        self._requests.close()
        self._process.wait(PATIENCE)


warm: Final[list[Zygote]] = []
"""What starts our programs meanwhile, see the fixture of this name."""


@contextlib.contextmanager
def whole_programs() -> Iterator[None]:
    """Among `warm` tests, for what the command line of a process shows."""
    others, warm[:] = warm[:], []
    try:
        yield
    finally:
        warm[:] = others


# -- the process itself -------------------------------------------------------------------


def _load() -> dict[str, str]:
    """Imports all; our programs' modules by the programs' names."""
    package = importlib.import_module("vtpm_cuse")
    for module in pkgutil.walk_packages(package.__path__, "vtpm_cuse."):
        if not module.name.startswith(_NOT_OURS_TO_LOAD):
            importlib.import_module(module.name)
    for name in _LOADED_LATE:
        importlib.import_module(name)
    gc.freeze()
    return entry_points()


def _become(modules: Mapping[str, str], request: bytes, fds: Sequence[int]) -> int:
    """The program that is asked for; returns its exit status."""
    asked = json.loads(request)
    passed = [fcntl.fcntl(fd, fcntl.F_DUPFD, _PASSED_FROM) for fd in fds]
    os.closerange(0, _PASSED_FROM)
    for number, fd in zip(asked["fds"], passed, strict=True):
        os.dup2(fd, number)
    os.closerange(_PASSED_FROM, _DESCRIPTORS_MAX)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(fd, "w" if fd else "r") for fd in range(3))
    os.environ.clear()
    os.environ.update(asked["env"])
    os.chdir(asked["cwd"])
    os.umask(asked["umask"])
    sys.argv = asked["argv"]
    name = Path(sys.argv[0]).name
    Path("/proc/self/comm").write_text(name)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        return int(importlib.import_module(modules[name]).main() or 0)
    except SystemExit as exc:
        if exc.code is None or isinstance(exc.code, int):
            return exc.code or 0
        sys.stderr.write(f"{exc.code}\n")
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()


def _serve(requests: socket.socket) -> None:
    modules = _load()
    requests.send(b"ready")
    poll = select.poll()
    poll.register(requests, select.POLLIN)
    children: dict[int, tuple[int, int]] = {}
    while True:
        for fd, _ in poll.poll():
            if fd != requests.fileno():
                poll.unregister(fd)
                pid, status = children.pop(fd)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with contextlib.suppress(BrokenPipeError):  # nobody waits for it any more
                    os.write(status, _STATUS.pack(code))
                os.close(fd)
                os.close(status)
                continue
            request, passed, *_ = socket.recv_fds(requests, _REQUEST_MAX, _PASSED_MAX)
            if not request:
                return
            pid = os.fork()
            *given, status = passed
            if pid == 0:
                os._exit(_become(modules, request, given))
            for one in given:
                os.close(one)
            pidfd = os.pidfd_open(pid)
            children[pidfd] = pid, status
            poll.register(pidfd, select.POLLIN)
            requests.send(_STATUS.pack(pid))


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
