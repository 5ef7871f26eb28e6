"""Resource managers for `tests.support.manager_stream`: ours on a socket, tpm2-abrmd, the kernel's."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from tests.support import sockets as s
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.zygote import Forked

HERE: Final = Path(__file__).parent
ABRMD: Final = "/usr/sbin/tpm2-abrmd"
_CLIENT: Final = (sys.executable, str(HERE / "tabrmd.py"))
_BUS: Final = """<busconfig><type>session</type><listen>unix:path={path}</listen>
<auth>EXTERNAL</auth><policy context="default"><allow send_destination="*"/><allow own="*"/>
<allow receive_type="method_call"/><allow receive_type="method_return"/>
<allow receive_type="error"/><allow receive_type="signal"/></policy></busconfig>
"""


def has_abrmd() -> bool:
    return os.access(ABRMD, os.X_OK) and shutil.which("dbus-daemon") is not None


def _descriptors(process: subprocess.Popen[Any] | Forked) -> int:
    return len(os.listdir(f"/proc/{process.pid}/fd"))


class Ours:
    """Connections to a managed socket of *process*."""

    def __init__(self, path: Path, process: subprocess.Popen[Any] | Forked) -> None:
        self._path, self._process = path, process
        self._there: dict[str, s.Client] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for client in self._there.values():
            client.close()

    def open(self, name: str) -> None:
        self._there[name] = s.connect(self._path)

    def ask(self, name: str, command: bytes) -> bytes | str:
        return self._there[name].command(command)

    def close(self, name: str) -> None:
        before = _descriptors(self._process)
        self._there.pop(name).close()
        wait_until(lambda: _descriptors(self._process) < before, f"{name} is closed")


class Abrmd:
    """Connections to tpm2-abrmd, by a child that has its library."""

    def __init__(self, child: subprocess.Popen[str], daemon: subprocess.Popen[bytes]) -> None:
        self._child, self._daemon = child, daemon

    def _do(self, *words: str) -> str:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        print(*words, file=self._child.stdin, flush=True)
        line = self._child.stdout.readline()
        assert line.endswith("\n"), "the child of tpm2-abrmd's library has ended"
        return line[:-1]

    def open(self, name: str) -> None:
        wait_until(lambda: not self._do("open", name), "tpm2-abrmd is there", process=self._daemon)

    def ask(self, name: str, command: bytes) -> bytes | str:
        answer = self._do("ask", name, command.hex())
        return answer if answer.startswith("tcti") else bytes.fromhex(answer)

    def close(self, name: str) -> None:
        before = _descriptors(self._daemon)
        self._do("close", name)
        wait_until(lambda: _descriptors(self._daemon) < before, f"{name} is closed")


class Kernel:
    """Opens of /dev/tpmrmN."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._there: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._there.values():
            os.close(fd)

    def open(self, name: str) -> None:
        self._there[name] = os.open(self._path, os.O_RDWR)

    def ask(self, name: str, command: bytes) -> bytes | str:
        try:
            os.write(self._there[name], command)
            return os.read(self._there[name], 4096)
        except OSError as exc:
            return errno.errorcode[exc.errno or 0]

    def close(self, name: str) -> None:
        os.close(self._there.pop(name))


@contextlib.contextmanager
def _running(*words: str | Path, **settings: Any) -> Iterator[subprocess.Popen[Any]]:  # noqa: ANN401
    with subprocess.Popen([*map(str, words)], **settings) as process:
        try:
            yield process
        finally:
            process.kill()


@contextlib.contextmanager
def abrmd_daemon(
    folder: Path, data: Path, *words: str
) -> Iterator[tuple[subprocess.Popen[Any], dict[str, str]]]:
    """Above the data socket of a TPM, on a session bus of its own; and the environment of clients."""
    folder.mkdir()
    bus, config = folder / "bus", folder / "bus.conf"
    config.write_text(_BUS.format(path=bus))
    env = {**os.environ, "DBUS_SESSION_BUS_ADDRESS": f"unix:path={bus}"}
    tcti = f"--tcti=cmd:{sys.executable} {HERE / 'relay.py'} {data}"
    with contextlib.ExitStack() as stack:
        log = stack.enter_context((folder / "log").open("wb"))
        quiet = {"env": env, "stdout": log, "stderr": log}
        serving = ("dbus-daemon", f"--config-file={config}", "--nofork")
        daemon = stack.enter_context(_running(*serving, **quiet))
        wait_until(partial(s.listens, bus), "the bus is there", process=daemon, log=folder / "log")
        managing = (ABRMD, "--session", "--allow-root", tcti, *words)
        yield stack.enter_context(_running(*managing, **quiet)), env


@contextlib.contextmanager
def abrmd(folder: Path, data: Path) -> Iterator[Abrmd]:
    """As `abrmd_daemon`, with clients."""
    with abrmd_daemon(folder, data) as (manager, env), (folder / "clients").open("wb") as log:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log, "text": True}
        with _running(*_CLIENT, env=env, **pipes) as child:
            yield Abrmd(child, manager)
