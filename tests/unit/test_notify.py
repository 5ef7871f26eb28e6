"""Who may speak to the service manager, and to which."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import pytest

from tests.support.processes import in_child
from vtpm_cuse.service.process import notify

if TYPE_CHECKING:
    from pathlib import Path


def manager_at(path: Path) -> socket.socket:
    """A service manager's end, and NOTIFY_SOCKET for this process."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind(str(path))
    sock.setblocking(False)
    os.environ["NOTIFY_SOCKET"] = str(path)
    return sock


def heard(sock: socket.socket) -> bytes | None:
    try:
        return sock.recv(100)
    except BlockingIOError:
        return None


@pytest.mark.parametrize("in_background", [False, True])
@in_child
def test_the_first_word_is_alone(tmp_path: Path, *, in_background: bool) -> None:
    with manager_at(tmp_path / "notify") as sock:
        notify.connect().ready(in_background=in_background)
        assert heard(sock) == b"READY=1"
        assert heard(sock) == (f"MAINPID={os.getpid()}".encode() if in_background else None)


@in_child
def test_a_child_does_not_say_that_it_is_the_service(tmp_path: Path) -> None:
    with manager_at(tmp_path / "notify") as sock:
        manager = notify.connect()
        child = os.fork()
        if child == 0:
            manager.ready(in_background=True)
            manager.stopping()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert heard(sock) is None
        manager.ready(in_background=False)
        assert heard(sock) == b"READY=1"


@in_child
def test_two_services_of_one_process_have_nothing_in_common(tmp_path: Path) -> None:
    with manager_at(tmp_path / "one") as one:
        first = notify.connect()
        second = notify.connect()  # the variable is spent
        second.ready(in_background=False)
        assert heard(one) is None
        first.stopping()
        assert heard(one) == b"STOPPING=1"


@in_child
def test_below_another_root_the_manager_is_the_one_from_before(tmp_path: Path) -> None:
    with manager_at(tmp_path / "notify") as sock:
        notify.keep()
        (tmp_path / "notify").unlink()  # nor would it be found below that root
        notify.connect().ready(in_background=False)
        assert heard(sock) == b"READY=1"
        assert "NOTIFY_SOCKET" not in os.environ


@pytest.mark.parametrize(
    "name", ["", "relative", "fd:", "fd:x", "fd:-1", "fd:999", f"fd:{2**99}", "/nowhere/at/all"]
)
@in_child
def test_no_manager(name: str) -> None:
    os.environ["NOTIFY_SOCKET"] = name
    notify.connect().ready(in_background=False)
    assert "NOTIFY_SOCKET" not in os.environ
