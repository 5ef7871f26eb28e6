"""Which process a connection comes from: never one that only has its number."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import pytest

from tests.kernel.harness import child, wait_child
from tests.support import sockets as s
from tests.support.engine import FakeEngine
from vtpm_cuse.acquire import peers
from vtpm_cuse.acquire.endpoints import Endpoints
from vtpm_cuse.acquire.peers import Credentials
from vtpm_cuse.acquire.sockets import acquire_managed
from vtpm_cuse.config import SocketAddress
from vtpm_cuse.errors import UsageError
from vtpm_cuse.resmgr.manager import Connection, Manager
from vtpm_cuse.serve.processes import Process, Processes
from vtpm_cuse.vtpm.clients import Client, Peer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


def a_client(number: int = 1) -> Client:
    return Client(Connection(Manager(FakeEngine()), number, None), Peer("unix"), 0, 0)


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with s.listener(tmp_path / "socket") as found:
        yield found


@pytest.fixture
def processes() -> Iterator[Processes]:
    found = Processes()
    yield found
    for saved in found.suspend():
        if saved.fd >= 0:
            os.close(saved.fd)


def connect(listener: socket.socket) -> socket.socket:
    found = socket.socket(socket.AF_UNIX)
    found.connect(listener.getsockname())
    return found


def accepted(listener: socket.socket) -> socket.socket:
    return listener.accept()[0]


def has_ended(process: Process) -> bool:
    return process.ended


def waiting(listener: socket.socket) -> Callable[[], None]:
    """For a child: connects, and lives until it is killed."""

    def body() -> None:
        with connect(listener) as connection:
            connection.recv(1)

    return body


def test_all_connections_of_a_process_are_its_own(
    listener: socket.socket, processes: Processes
) -> None:
    with connect(listener), accepted(listener) as first:
        assert processes.find(first) is None
        mine = processes.begin(first, a_client())
        assert mine is not None
        assert mine.credentials == Credentials(os.getpid(), os.geteuid(), os.getegid())
        assert not mine.ended
    with connect(listener), accepted(listener) as second:
        assert processes.find(second) is mine
        assert processes.of(mine.client) is mine
        processes.forget(mine)
        assert processes.find(second) is None
        mine.close()


def test_a_child_is_another(listener: socket.socket, processes: Processes) -> None:
    with connect(listener), accepted(listener) as first, child(waiting(listener)):
        mine = processes.begin(first, a_client())
        with accepted(listener) as other:
            assert processes.find(other) is None
            theirs = processes.begin(other, a_client(2))
        assert theirs is not None
        assert mine is not None
        assert theirs.credentials.pid != mine.credentials.pid


def test_a_number_that_is_used_again_is_nobodys(
    listener: socket.socket, processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether who had it has ended, or the kernel's word of the number is wrong."""
    with child(waiting(listener)) as pid, accepted(listener) as first:
        theirs = processes.begin(first, a_client())
        assert theirs is not None
        monkeypatch.setattr(Credentials, "of", lambda _: theirs.credentials)
        with connect(listener), accepted(listener) as second:
            assert not has_ended(theirs)
            assert processes.find(second) is None
            monkeypatch.setattr(os.path, "sameopenfile", lambda *_: True)  # Linux 6.5 to 6.8
            assert processes.find(second) is theirs
            os.kill(pid, 9)
            wait_child(pid)
            assert has_ended(theirs)
            assert processes.find(second) is None
            theirs.close()
            assert has_ended(theirs)


def test_who_cannot_be_told_is_none(
    listener: socket.socket, processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        s.listener() as network,
        socket.create_connection(network.getsockname()),
        accepted(network) as tcp,
    ):
        assert processes.find(tcp) is None
        assert processes.begin(tcp, a_client()) is None
    with connect(listener), accepted(listener) as first:
        elsewhere = Credentials(0, os.geteuid(), os.getegid())  # in a PID namespace beside ours
        monkeypatch.setattr(Credentials, "of", lambda _: elsewhere)
        assert processes.begin(first, a_client()) is None
        assert processes.find(first) is None


def test_a_kernel_that_does_not_tell_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "_SO_PEERPIDFD", 0x7FFF)
    endpoints = Endpoints()
    address = SocketAddress("unixio", path=str(tmp_path / "m"), per_process=True)
    with pytest.raises(UsageError, match="does not tell which process connects"):
        acquire_managed(endpoints, address)
    assert endpoints.managed_listener is None
