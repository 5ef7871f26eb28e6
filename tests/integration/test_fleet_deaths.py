"""A manager that is killed: its workers end, and what was acknowledged is there."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from tests.support import commands as tpm
from tests.support.files import open_files
from tests.support.waiting import PATIENCE_SECONDS, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

CHILD: Final = Path(__file__).with_name("fleet_child.py")
TREE: Final = Path(__file__).parents[2]
SIZE: Final = 8


@contextlib.contextmanager
def life(folder: Path, idle: float) -> Iterator[tuple[subprocess.Popen[bytes], dict[str, Any]]]:
    """A manager, and what it tells; killed in the end."""
    words = [sys.executable, str(CHILD), str(folder), str(idle)]
    environment = {**os.environ, "PYTHONPATH": str(TREE)}
    with subprocess.Popen(words, stdout=subprocess.PIPE, env=environment) as process:
        try:
            assert process.stdout is not None
            yield process, json.loads(process.stdout.readline())
        finally:
            process.kill()


@contextlib.contextmanager
def client(path: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as found:
        found.settimeout(PATIENCE_SECONDS)
        found.connect(path)
        yield found


def asked(connection: socket.socket, command: bytes) -> bytes:
    connection.sendall(command)
    return connection.recv(4096)


def written(number: int) -> bytes:
    return tpm.nv_write(tpm.NV_INDEX, number.to_bytes(SIZE, "big"))


def is_gone(process: int) -> bool:
    return not Path(f"/proc/{process}").exists()


def status_of(process: int) -> dict[str, str]:
    lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


@pytest.mark.parametrize("idle", [3600.0, 0.01], ids=["awake", "restless"])
def test_a_killed_manager_loses_nothing_that_was_acknowledged(tmp_path: Path, idle: float) -> None:
    acknowledged = -1
    for _ in range(2):
        with life(tmp_path, idle) as (manager, told), client(told["socket"]) as connection:
            if acknowledged < 0:
                assert tpm.code_of(asked(connection, tpm.nv_define(tpm.NV_INDEX, SIZE))) == 0
            else:
                answer = asked(connection, tpm.nv_read(tpm.NV_INDEX, SIZE))
                found = int.from_bytes(tpm.nv_data(answer), "big")
                assert found in {acknowledged, acknowledged + 1}
                acknowledged = found
            for _ in range(5):
                assert tpm.code_of(asked(connection, written(acknowledged + 1))) == 0
                acknowledged += 1
            connection.sendall(written(acknowledged + 1))  # in the middle of it
            manager.send_signal(signal.SIGKILL)
            with contextlib.suppress(ConnectionError):
                while connection.recv(4096):
                    pass  # its answer may have been on its way
            wait_until(functools.partial(is_gone, told["worker"]), "the end of the worker")


def test_the_manager_has_no_engine_and_a_worker_nothing_else(tmp_path: Path) -> None:
    with life(tmp_path, 3600.0) as (manager, told):
        maps = Path(f"/proc/{manager.pid}/maps").read_text(encoding="utf-8")
        assert "libtpms" not in maps
        worker = status_of(told["worker"])
        for found in (worker, status_of(int(worker["PPid"]))):  # and the zygote
            assert (found["Seccomp"], found["NoNewPrivs"]) == ("2", "1")
            assert int(found["CapEff"], 16) == int(found["CapPrm"], 16) == 0
            users = set(found["Uid"].split())
            assert len(users) == 1
            assert (users == {str(os.geteuid())}) == (os.geteuid() != 0)  # of root's, somebody else
            assert not found["Groups"] or os.geteuid() != 0
        opened = open_files(told["worker"])
        assert opened
        assert not [name for name in opened.values() if name.startswith(str(tmp_path))]


ZYGOTES: Final = """
import ctypes, os, socket
from vtpm_cuse.service.confine import seccomp
number = ctypes.CDLL("libseccomp.so.2").seccomp_syscall_resolve_name(b"clone")
libc = ctypes.CDLL(None)
seccomp.make_filter("kill", sockets=True, hands_over=True, forks=True).load()
"""


@pytest.mark.parametrize(
    ("attempt", "status"),
    [
        ("os._exit(os.waitstatus_to_exitcode(os.waitpid(os.fork() or os._exit(7), 0)[1]))", 7),
        ("os.execv('/bin/true', ['true'])", -signal.SIGSYS),
        ("socket.socket()", -signal.SIGSYS),
        ("libc.unshare(0x20000)", -signal.SIGSYS),
        # A process with a name space of its own: there is no such call.
        ("os._exit(7 if libc.syscall(number, 0x20000011, 0, 0, 0, 0) == -1 else 1)", 7),
    ],
    ids=["fork", "program", "socket", "unshare", "clone"],
)
def test_what_forks_workers_can_do_little_else(attempt: str, status: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ZYGOTES + attempt], env={**os.environ, "PYTHONPATH": str(TREE)}
    )
    assert done.returncode == status
