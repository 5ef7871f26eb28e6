"""`swtpm socket` keeps serving its owner, whatever number of strangers connect and whatever they say."""

from __future__ import annotations

import array
import contextlib
import resource
import signal
import socket
import struct
from typing import TYPE_CHECKING

import pytest

from tests.support import commands as tpm
from tests.support import sockets as s
from tests.support.sockets import RUNNING, Client, Server, u32

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CAPABILITIES = u32(0, 0x1FFFF)
RANDOM = tpm.get_random(8)
INDEX = 0x01800001
MANY = 300
FEW_DESCRIPTORS = 48


@pytest.fixture(params=["unixio", "tcp"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path, *RUNNING, control=request.param, data=request.param) as running:
        running.request(s.GET_CAPABILITY, size=8)
        yield running


@contextlib.contextmanager
def strangers(server: Server, count: int) -> Iterator[list[Client]]:
    """Connections that say nothing."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(server.control()) for _ in range(count)]


def asks(client: Client) -> bool:
    return client.control(s.GET_CAPABILITY, size=8) == CAPABILITIES


def writes(server: Server, *, define: bool) -> int:
    """The result of an NV_Write, for which the TPM needs a descriptor."""
    with server.data() as data:
        if define:
            assert tpm.code_of(data.command(tpm.nv_define(INDEX, 8))) == 0
        return tpm.code_of(data.command(tpm.nv_write(INDEX, b"12345678")))


# -- connections --------------------------------------------------------------------------


def test_silent_connections_keep_nobody_out(server: Server) -> None:
    """The monitor has one too, and has said nothing since it came."""
    with server.control() as monitor:
        assert asks(monitor)
        before = server.descriptors()
        with strangers(server, MANY), server.control() as client:
            assert asks(client)
            assert server.descriptors() < before + FEW_DESCRIPTORS
            assert asks(monitor), "it was there before"
            assert writes(server, define=True) == 0
        server.settle(before)


@pytest.mark.parametrize("said", [b"", RANDOM[:4]])
def test_data_client_that_says_nothing_makes_way(server: Server, said: bytes) -> None:
    """Not one that has been served, whoever waits."""
    with server.data() as stranger:
        stranger.send(said)
        with server.data() as client:
            assert tpm.code_of(client.command(RANDOM)) == 0
            assert stranger.ended()
            with server.data() as waiting:
                waiting.send(RANDOM)
                assert not s.readable(waiting.socket, 1.5)
                assert tpm.code_of(client.command(RANDOM)) == 0
                client.close()
                assert tpm.code_of(waiting.response()) == 0


def test_of_the_silent_the_oldest_goes(server: Server) -> None:
    with strangers(server, 1) as [oldest], strangers(server, 10) as young:
        assert not s.readable(oldest.socket)
        with strangers(server, 25):
            assert oldest.ended()
            assert all(asks(client) for client in young[-5:]), "there was room for these"


def test_clients_that_ask_and_stay_do_not_keep_others_out(server: Server) -> None:
    """A tool that forgets to close; the monitor was there before."""
    with server.control() as monitor, contextlib.ExitStack() as stack:
        assert asks(monitor)
        for _ in range(MANY):
            assert asks(stack.enter_context(server.control()))
        assert asks(monitor)


def test_passed_control_connection_stays_whoever_else_comes(tmp_path: Path) -> None:
    """It is the first, and says nothing until a guest starts."""
    with s.socket_pair() as (client, theirs):
        fd = theirs.fileno()
        options = ("--ctrl", f"type=unixio,clientfd={fd}")
        with Server(tmp_path, *RUNNING, *options, control=None, pass_fds=[fd]) as server:
            theirs.close()
            assert asks(client)
            assert writes(server, define=True) == 0


def test_no_descriptor_left(server: Server) -> None:
    """Those who say nothing go, one by one; nothing waits, and no log fills."""
    with server.control() as monitor:
        assert asks(monitor)
        limit = server.descriptors() + 6
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (limit, limit))
        with strangers(server, 60):
            for _ in range(5):
                with server.control() as client:
                    assert asks(client)
            assert asks(monitor)
            with server.data() as data:
                assert tpm.code_of(data.command(RANDOM)) == 0
    assert len(server.log_text()) < 20_000


def test_clients_that_reset_their_connections_end_nothing(tmp_path: Path) -> None:
    """Some are reset before they are accepted: the server stands still meanwhile."""
    linger = (socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with Server(tmp_path, *RUNNING, data="tcp", control="tcp") as server:
        server.process.send_signal(signal.SIGSTOP)
        for make in (server.control, server.data) * 20:
            with make() as client:
                client.socket.setsockopt(*linger)
        server.process.send_signal(signal.SIGCONT)
        with server.control() as client:
            assert asks(client)
        with server.data() as data:
            assert tpm.code_of(data.command(RANDOM)) == 0


def test_a_client_that_never_reads_keeps_nobody_waiting(tmp_path: Path) -> None:
    with Server(tmp_path, *RUNNING) as server, server.control() as deaf:
        deaf.socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                deaf.socket.send(u32(s.GET_STATEBLOB, 1, s.PERMANENT, 0))
        with server.control() as client:
            assert asks(client)
            assert client.result(s.SHUTDOWN) == 0
        assert server.wait() == 0


def test_shutdown_by_a_client_that_has_read_nothing(tmp_path: Path) -> None:
    """There is no room for the answer, nor will there be."""
    with s.socket_pair() as (client, theirs):
        theirs.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                theirs.send(bytes(4096))
        with contextlib.suppress(BlockingIOError):
            while True:
                theirs.send(bytes(1))
        fd = theirs.fileno()
        options = ("--ctrl", f"type=unixio,clientfd={fd}")
        with Server(tmp_path, *RUNNING, *options, control=None, pass_fds=[fd]) as server:
            client.send(u32(s.SHUTDOWN))
            assert server.wait() == 0


# -- requests that are not complete ---------------------------------------------------------


def test_half_requests_with_descriptors_do_not_cost_the_tpm(tmp_path: Path) -> None:
    """Each with sixteen; in failure mode the TPM would stay after they have gone."""
    half = u32(s.SET_STATEBLOB, 0, 1, 500_000) + bytes(5000)
    with Server(tmp_path, *RUNNING) as server:
        assert writes(server, define=True) == 0
        before = server.descriptors()
        with strangers(server, 64) as clients, s.socket_pair() as (_, passed):
            rights = array.array("i", [passed.fileno()] * 16).tobytes()
            for client in clients:
                with contextlib.suppress(BrokenPipeError):
                    client.socket.sendmsg([half], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
            with server.control() as client:
                assert asks(client)
            assert server.descriptors() < before + FEW_DESCRIPTORS
            assert writes(server, define=False) == 0
        server.settle(before)
        assert writes(server, define=False) == 0


def test_descriptor_of_a_request_that_takes_none_is_closed_when_it_comes(tmp_path: Path) -> None:
    with Server(tmp_path, *RUNNING) as server, server.control() as client:
        assert asks(client)
        before = server.descriptors()
        with s.socket_pair() as (_, passed):
            rights = array.array("i", [passed.fileno()]).tobytes()
            half = u32(s.SET_STATEBLOB, 0, 1, 500_000) + bytes(5000)
            client.socket.sendmsg([half], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
            with server.control() as other:
                assert asks(other), "so it has read what came before"
        server.settle(before)


def test_half_requests_take_little_memory(server: Server) -> None:
    """Of the longest that are taken; a state blob of the owner still comes through."""
    almost = u32(s.HASH_DATA, (1 << 20) - 100) + bytes((1 << 20) - 200)
    with server.control() as monitor:
        assert asks(monitor)
        before = server.resident_kib()
        with strangers(server, 30) as clients:
            for client in clients:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    client.send(almost)
            assert server.resident_kib() < before + (16 << 10)
            assert monitor.result(s.HASH_START) == 0
            assert monitor.result(s.HASH_DATA, u32(500_000) + bytes(500_000)) == 0
            assert monitor.result(s.HASH_END) == 0


# -- the log --------------------------------------------------------------------------------


def test_unknown_requests_do_not_fill_the_log(tmp_path: Path) -> None:
    with Server(tmp_path, *RUNNING) as server:
        with server.control() as client:
            for number in range(2000):
                assert client.result(100 + number) == 0xA
            assert client.result(s.SHUTDOWN) == 0
        assert server.wait() == 0
        lines = [line for line in server.log_text().splitlines() if "Unknown command" in line]
        assert len(lines) < 200
        assert sum("more like this" in line for line in lines) > 0
