"""`swtpm socket` among clients and processes that do not behave."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest

from tests.support import sockets as s
from tests.support.sockets import RUNNING, Server, run_swtpm
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from pathlib import Path

SECOND = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


@pytest.mark.parametrize("second", SECOND)
def test_signals_that_come_together_end_it_in_order(tmp_path: Path, second: int) -> None:
    """Both wait for the stopped process, so it sees them at once."""
    pid_file = tmp_path / "pid"
    with Server(tmp_path, *RUNNING, "--pid", f"file={pid_file}") as server:
        assert server.request(s.GET_CAPABILITY, size=8)
        server.process.send_signal(signal.SIGSTOP)
        server.process.send_signal(signal.SIGTERM)
        server.process.send_signal(second)
        server.process.send_signal(signal.SIGCONT)
        assert server.wait() == 0
        assert not pid_file.exists()


def test_signals_after_the_end_has_begun(tmp_path: Path) -> None:
    """A monitor says SHUTDOWN, and its manager SIGTERM: the status is that of an orderly end."""
    with Server(tmp_path, *RUNNING) as server:
        assert server.request(s.SHUTDOWN) == s.u32(0)
        while server.process.poll() is None:
            server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0


@pytest.mark.parametrize("kind", ["tcp", "unixio"])
def test_who_has_the_answer_to_shutdown_can_start_a_successor(tmp_path: Path, kind: str) -> None:
    """On the same paths and state, while the process still lives, which then takes nothing away."""
    pid_file, paths = tmp_path / "pid", [tmp_path / "own-ctrl", tmp_path / "own-data"]
    port = s.free_ports()
    words = [*RUNNING, "--pid", f"file={pid_file}"]
    if kind == "tcp":
        words += ["--server", f"type=tcp,port={port}", "--ctrl", f"type=tcp,port={port + 1}"]
    else:
        words += [
            "--ctrl",
            f"type=unixio,path={paths[0]}",
            "--server",
            f"type=unixio,path={paths[1]}",
        ]
    addresses = [port + 1, port] if kind == "tcp" else paths

    def is_there() -> bool:
        with s.connect(addresses[1]) as data:
            return bool(data.command(b"\x80\x01" + s.u32(10, 0x144)))

    state = tmp_path / "state"
    with Server(tmp_path, *words, state=state, data=None, control=None) as first:
        wait_until(pid_file.exists, "the first is there", process=first.process)
        with s.connect(addresses[0]) as client:
            assert client.result(s.SHUTDOWN) == 0
            first.process.send_signal(signal.SIGSTOP)
            left = [path.name for path in (pid_file, *paths) if path.exists()]
            assert (left, s.is_locked(state)) == ([], False)
        with Server(tmp_path, *words, state=state, data=None, control=None) as second:
            wait_until(pid_file.exists, "the second is there", process=second.process)
            first.process.send_signal(signal.SIGCONT)
            assert first.wait() == 0
            assert is_there()
            assert pid_file.read_text() == str(second.process.pid)


def test_shutdown_by_one_who_does_not_wait_for_the_answer(tmp_path: Path) -> None:
    with Server(tmp_path, *RUNNING) as server:
        with server.control() as client:
            client.send(s.u32(s.SHUTDOWN))
        assert server.wait() == 0


def test_a_second_server_leaves_the_first_one_reachable(tmp_path: Path) -> None:
    path = tmp_path / "own"
    control = ("--ctrl", f"type=unixio,path={path}")
    with Server(tmp_path / "a", *control, control=None) as first:
        with first.data() as client:  # answers, so it listens everywhere
            assert client.command(b"\x80\x01" + s.u32(10, 0x144))
        done = run_swtpm(*control, "--tpm2", "--tpmstate", f"dir={tmp_path}")
        assert done.returncode == 1
        assert f"{path} is in use by another process" in done.stderr
        with s.connect(path) as client:
            assert client.control(s.GET_CAPABILITY, size=8)


def test_a_file_in_place_of_the_socket_stays(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("data")
    done = run_swtpm("--tpm2", "--ctrl", f"type=unixio,path={precious}")
    assert (done.returncode, precious.read_text()) == (1, "data")
    assert "is no socket" in done.stderr


def test_the_socket_of_a_killed_process_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "own"
    for life in "ab":
        with Server(tmp_path / life, "--ctrl", f"type=unixio,path={path}", control=None) as server:
            with server.data() as client:
                assert client.command(b"\x80\x01" + s.u32(10, 0x144))
            assert path.is_socket()


def test_the_successors_socket_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "own"
    with Server(tmp_path / "a", "--ctrl", f"type=unixio,path={path}", control=None) as server:
        with server.data() as client:
            assert client.command(b"\x80\x01" + s.u32(10, 0x144))
        path.unlink()
        with s.listener(path):
            server.process.terminate()
            assert server.wait() == 0
            assert path.is_socket()


def test_a_pipe_in_place_of_the_lock_file(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    os.mkfifo(state / ".lock")
    with Server(tmp_path) as server:
        assert server.init() == 9
