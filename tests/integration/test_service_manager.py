"""What service managers are told, and the sockets they pass."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from tests.support import sockets as s
from tests.support.commands import get_random
from tests.support.programs import module_of
from tests.support.service_manager import started
from tests.support.waiting import PATIENCE_SECONDS
from vtpm_cuse.client.manager import Manager

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> socket.socket:
    """A service manager's end of NOTIFY_SOCKET."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind(str(tmp_path / "notify"))
    sock.settimeout(PATIENCE_SECONDS)
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    return sock


def test_readiness_and_end(manager: socket.socket, tmp_path: Path) -> None:
    with manager, s.Server(tmp_path, *s.RUNNING) as server:
        assert manager.recv(100) == b"READY=1"
        server.process.send_signal(signal.SIGTERM)
        assert manager.recv(100) == b"STOPPING=1"
        assert server.wait() == 0


def test_readiness_of_the_process_in_the_background(manager: socket.socket, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    state = ["--tpm2", "--tpmstate", f"dir={tmp_path / 'state'}", *s.RUNNING]
    control = ["--ctrl", f"type=unixio,path={tmp_path / 'ctrl'}"]
    pid_file = tmp_path / "pid"
    with manager:
        done = s.run_swtpm(*state, *control, "--daemon", "--pid", f"file={pid_file}")
        assert done.returncode == 0, done.stderr
        assert manager.recv(100) == b"READY=1"
        assert manager.recv(100) == b"MAINPID=" + pid_file.read_bytes()
        with s.connect(tmp_path / "ctrl") as client:
            assert client.control(s.SHUTDOWN) == s.u32(0)
        assert manager.recv(100) == b"STOPPING=1"


def test_no_manager_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    with s.Server(tmp_path, *s.RUNNING) as server:
        assert server.request(s.GET_CONFIG, size=8)
        assert "Could not reach the service manager" in server.log_text()


def passed(
    tmp_path: Path, names: str, *words: str, stderr: int | None = None
) -> subprocess.Popen[bytes]:
    """A server that is given two listening sockets."""
    (tmp_path / "state").mkdir()
    with ExitStack() as stack:
        listeners = [stack.enter_context(s.listener(tmp_path / name)) for name in ("data", "ctrl")]
        server = (*s.OURS[1:], "socket", "--tpm2", "--tpmstate", f"dir={tmp_path / 'state'}")
        return started(
            names, [one.fileno() for one in listeners], *server, *s.RUNNING, *words, stderr=stderr
        )


def test_passed_sockets(tmp_path: Path) -> None:
    with passed(tmp_path, "data:ctrl") as process:
        with s.connect(tmp_path / "data") as client:
            client.send(get_random(32))
            assert len(client.exactly(44)) == 44
        with s.connect(tmp_path / "ctrl") as client:
            assert client.control(s.SHUTDOWN) == s.u32(0)
        assert process.wait(PATIENCE_SECONDS) == 0
    assert {"data", "ctrl"} <= set(os.listdir(tmp_path))  # the manager's, not ours to remove


def test_a_passed_socket_that_an_option_names_by_number_needs_no_name(tmp_path: Path) -> None:
    """As systemd-vmspawn has it, whose socket unit is called by its file."""
    with passed(tmp_path, "vm-tpm.socket:ctrl", "--server", "type=unixio,fd=3") as process:
        with s.connect(tmp_path / "data") as client:
            client.send(get_random(32))
            assert len(client.exactly(44)) == 44
        with s.connect(tmp_path / "ctrl") as client:
            assert client.control(s.SHUTDOWN) == s.u32(0)
        assert process.wait(PATIENCE_SECONDS) == 0


@pytest.mark.parametrize(
    ("names", "words", "reason"),
    [
        ("data:other", [], "The socket 'other' of LISTEN_FDS cannot be used; each needs a name"),
        ("data:data", [], "The socket 'data' of LISTEN_FDS cannot be used"),
        ("data", [], "The socket '' of LISTEN_FDS cannot be used"),
        ("data:ctrl", ["--port", "0"], "The data channel is both an option and a socket of"),
    ],
)
def test_passed_sockets_that_do_not_fit(
    names: str, words: list[str], reason: str, tmp_path: Path
) -> None:
    with passed(tmp_path, names, *words, stderr=subprocess.PIPE) as process:
        _, said = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 1
    assert said.decode().startswith(f"swtpm: {reason}")


def test_a_manager_of_many_is_asked_on_a_passed_socket(
    manager: socket.socket, tmp_path: Path
) -> None:
    code = f"import sys; from {module_of('vtpmd')} import main; sys.exit(main())"
    words = ("-c", code, "--state", str(tmp_path / "state"), "--run", str(tmp_path / "run"))
    path = tmp_path / "manager.sock"
    with manager, s.listener(path) as listener:
        process = started("manager", [listener.fileno()], *words, stderr=subprocess.PIPE)
        with process, Manager(str(path)) as asking:
            assert asking.list() == []
            assert manager.recv(100) == b"READY=1"
            process.send_signal(signal.SIGTERM)
            _, said = process.communicate(timeout=PATIENCE_SECONDS)
    assert (process.returncode, path.is_socket()) == (0, True)
    assert set(os.listdir(tmp_path / "run")) <= {"tpm"}
    assert all(line.startswith("vtpmd: ") for line in said.decode().splitlines())


def test_sockets_passed_to_another_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LISTEN_PID", "1")
    monkeypatch.setenv("LISTEN_FDS", "2")
    with s.Server(tmp_path, *s.RUNNING) as server:
        assert server.request(s.GET_CONFIG, size=8)
