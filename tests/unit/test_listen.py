"""Which sockets a command line of `swtpm socket` gets, and in what shape."""

from __future__ import annotations

import os
import socket
import stat
from typing import TYPE_CHECKING

import pytest

from tests.support.files import open_descriptors, umask
from vtpm_cuse.acquire.sockets import acquire
from vtpm_cuse.cli.emulator import settings
from vtpm_cuse.cli.emulator.swtpm_socket import PROGRAM
from vtpm_cuse.cli.words.commandline import CommandLine
from vtpm_cuse.config import SocketAddress, SocketConfig
from vtpm_cuse.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from vtpm_cuse.acquire.endpoints import Endpoints

NO_PORT = "TPM_PORT is not set or contains an invalid integer value."


def config_of(words: str) -> SocketConfig:
    return settings.socket_config(CommandLine(PROGRAM, words.split()))


def complaint(words: str) -> str:
    before = open_descriptors()
    with pytest.raises(UsageError) as caught:
        acquire(config_of(words)).close()
    assert caught.value.exit_status == 1
    assert open_descriptors() <= before, "nothing stays open"
    return str(caught.value)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    first, second = socket.socketpair()
    with first, second:
        yield first, second


def acquired(words: str) -> Endpoints:
    return acquire(config_of(words))


def connects_unix(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


# -- the command line -----------------------------------------------------------------------


def test_port_is_short_for_a_server_that_disconnects() -> None:
    config = config_of("-p 0x1000")
    assert config.data == SocketAddress("tcp", port=4096)
    assert config.disconnect


@pytest.mark.parametrize(
    ("words", "kind", "disconnect"),
    [
        ("-p 1 --server type=unixio,path=/x", "unixio", False),
        ("--server type=unixio,path=/x -p 1", "tcp", True),
        ("-p 1 --server type=unixio,path=/x,disconnect -p 1", "tcp", True),
        ("--server port=3,disconnect --server port=4", "tcp", False),
        ("--fd 9 -p 1", "tcp", True),
        ("--server type=unixio,path=/x --fd 9", "unixio", False),
    ],
)
def test_last_of_port_and_server_counts_and_fd_only_alone(
    words: str, kind: str, disconnect: bool
) -> None:
    config = config_of(words)
    assert config.data is not None
    assert (config.data.kind, config.disconnect) == (kind, disconnect)
    assert config.data.fd is None


def test_port_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPM_PORT", "4711")
    assert config_of("--server type=tcp").data == SocketAddress("tcp", port=4711)
    assert config_of("--server port=5").data == SocketAddress("tcp", port=5)
    assert config_of("-p 6 --server type=tcp").data == SocketAddress("tcp", port=6)
    monkeypatch.setenv("TPM_PORT", "no number")
    assert complaint("--server type=tcp") == NO_PORT


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--server type=tcp", NO_PORT),
        ("--server type=unixio", "Missing path and file descriptor option for UnixIO socket"),
        ("--ctrl type=unixio", "Missing path and fd options for UnixIO control channel"),
        ("--ctrl type=tcp", "Missing port and fd options for TCP control channel"),
        ("--ctrl type=tcp,clientfd=9", "Missing port and fd options for TCP control channel"),
        ("--ctrl path=/x", "Missing type parameter for control channel"),
        ("--ctrl type=unixio,path=/x,mode=888", "invalid number '888'"),
        ("--ctrl type=unixio,path=/x,uid=no-such", "User 'no-such' does not exist."),
        ("--ctrl type=tcp,port=x", "Error parsing ctrl options: invalid number 'x'"),
        ("--server port=70000", "70000"),
        ("--server type=udp,port=1", "udp"),
        ("-p 70000", "70000"),
        ("-f 2", "Error: Cannot accept file descriptors with values 0, 1, or 2"),
        ("-f x", "Cannot parse socket file descriptor."),
        ("--migration foo", "Error parsing migration options: Unknown option 'foo'"),
        ("--migration incoming=no,foo", "Unknown option 'foo'"),
        ("--server port=1,bindaddr=localhost", "Could not parse the bind address 'localhost'"),
        ("--server port=1,bindaddr=1.2.3", "Could not parse the bind address '1.2.3'"),
        ("--server port=1,bindaddr=fe80::1", "Missing interface name for link local address"),
        (
            "--server port=1,bindaddr=fe80::1,ifname=no-such",
            "Could not convert interface name 'no-such' to index: No such device",
        ),
        ("--server port=1,bindaddr=192.0.2.1", "Cannot assign requested address"),
        ("-f 987", "Cannot stat file descriptor: Bad file descriptor"),
        ("--ctrl type=unixio,path=/no/such/folder/x", "No such file or directory"),
        (f"--ctrl type=unixio,path=/{'x' * 107}", "Path for UnixIO socket is too long"),
    ],
)
def test_complaints(words: str, expected: str) -> None:
    assert expected in complaint(words)


def test_migration_flags() -> None:
    assert config_of("--migration incoming,release-lock-outgoing").vtpm.incoming
    assert not config_of("--migration release-lock-outgoing").vtpm.incoming


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--seccomp action=x", "Unsupported seccomp log action x"),
        ("--seccomp kill", "Error parsing seccomp options: Unknown option 'kill'"),
        ("--runas no-such-user", "Error: User 'no-such-user' does not exist."),
    ],
)
def test_sandbox_complaints(option: str, expected: str) -> None:
    assert expected in complaint(option)


# -- sockets --------------------------------------------------------------------------------


@pytest.mark.parametrize(("host", "family"), [("127.0.0.1", "AF_INET"), ("::1", "AF_INET6")])
def test_tcp(host: str, family: str) -> None:
    endpoints = acquired(f"--server port=0,bindaddr={host}")
    assert endpoints.data_listener is not None
    assert endpoints.data_listener.family == socket.AddressFamily[family]
    port = endpoints.data_listener.getsockname()[1]
    socket.create_connection((host, port)).close()
    endpoints.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, port))


@pytest.mark.parametrize("words", ["--server port=0", "--server port=0,bindaddr=127.0.0.1"])
def test_a_tcp_port_is_open_to_this_machine_alone_unless_told_otherwise(words: str) -> None:
    channels = acquired(words)
    assert channels.data_listener is not None
    assert channels.data_listener.getsockname()[0] == "127.0.0.1"
    channels.close()


@pytest.mark.parametrize("inherited", [True, False])
def test_tcp_connections_answer_at_once_and_end_with_the_clients_machine(inherited: bool) -> None:
    """They have it from the listening socket: nothing can be set in the sandbox."""
    with socket.create_server(("127.0.0.1", 0)) as given:
        words = f"type=tcp,fd={os.dup(given.fileno())}" if inherited else "type=tcp,port=0"
        endpoints = acquired(f"--ctrl {words}")
        listener = endpoints.control_listener
        assert listener is not None
        listener.setblocking(True)
        with socket.create_connection(listener.getsockname()):
            connection, _ = listener.accept()
            with connection:
                assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
                assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
                assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60
        endpoints.close()


def test_tcp_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert "Address already in use" in complaint(f"--server port={port}")


def test_port_is_free_again_at_once() -> None:
    """Connections of a process before may linger in TIME_WAIT."""
    endpoints = acquired("--server port=0")
    assert endpoints.data_listener is not None
    port = endpoints.data_listener.getsockname()[1]
    with socket.create_connection(("127.0.0.1", port)):
        endpoints.data_listener.setblocking(True)
        endpoints.data_listener.accept()[0].close()
    endpoints.close()
    acquired(f"--server port={port}").close()


@pytest.mark.parametrize(
    ("option", "mode"), [("", 0o770), (",mode=0600", 0o600), (",mode=777", 0o777)]
)
def test_unix_mode_is_exact_whatever_the_umask(option: str, mode: int, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with umask(0o077 if mode == 0o777 else 0):
        endpoints = acquired(f"--ctrl type=unixio,path={path}{option}")
    assert stat.S_IMODE(path.stat().st_mode) == mode
    endpoints.close()
    assert not path.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_unix_owner(tmp_path: Path) -> None:
    path = tmp_path / "s"
    endpoints = acquired(f"--server type=unixio,path={path},uid=12345,gid=daemon")
    assert (path.stat().st_uid, path.stat().st_gid) == (12345, 1)
    endpoints.close()


def test_path_left_over_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as left_over:
        left_over.bind(str(path))
    assert not connects_unix(path)
    endpoints = acquired(f"--ctrl type=unixio,path={path}")
    assert connects_unix(path)
    endpoints.close()


def test_failure_takes_back_what_was_bound(tmp_path: Path) -> None:
    path = tmp_path / "s"
    complaint(f"--ctrl type=unixio,path={path} --server port=1,bindaddr=192.0.2.1")
    assert not path.exists()


def test_longest_path(tmp_path: Path) -> None:
    path = tmp_path / ("x" * (107 - len(str(tmp_path)) - 1))
    acquired(f"--ctrl type=unixio,path={path}").close()
    assert "too long" in complaint(f"--ctrl type=unixio,path={path}x")


def test_inherited_descriptors(pair: tuple[socket.socket, socket.socket], tmp_path: Path) -> None:
    connected = os.dup(pair[0].fileno())
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s"))
        listening.listen()
        words = f"--ctrl type=unixio,fd={os.dup(listening.fileno())},clientfd=999,path=/x"
        endpoints = acquired(f"{words} --server type=tcp,port=1,fd={connected}")
    assert endpoints.control_listener is not None, "fd comes before clientfd and path"
    assert endpoints.control_stream is None
    assert endpoints.data_stream is not None, "for tcp it is connected"
    assert endpoints.data_listener is None
    endpoints.close()
    endpoints = acquired(f"--ctrl type=unixio,clientfd={os.dup(pair[1].fileno())},path=/x")
    assert endpoints.control_stream is not None
    assert endpoints.control_listener is None
    endpoints.close()


@pytest.mark.parametrize("words", ["--server type=unixio,fd={}", "--ctrl type=unixio,fd={}"])
def test_connected_where_listening_is_wanted(
    words: str, pair: tuple[socket.socket, socket.socket]
) -> None:
    """PEER: accepts in vain, for ever."""
    fd = os.dup(pair[0].fileno())
    with pytest.raises(UsageError, match="is not a listening socket"):
        acquired(words.format(fd))


@pytest.mark.parametrize("words", ["-f {}", "--ctrl type=unixio,clientfd={}"])
def test_listening_where_connected_is_wanted(words: str, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s"))
        listening.listen()
        fd = os.dup(listening.fileno())
        with pytest.raises(UsageError, match="is not a connected socket"):
            acquired(words.format(fd))


@pytest.mark.parametrize(
    "words",
    [
        "--server type=unixio,fd={}",
        "--ctrl type=tcp,fd={}",
        "--ctrl type=unixio,clientfd={}",
    ],
)
def test_descriptor_of_a_file(words: str, tmp_path: Path) -> None:
    with open(tmp_path / "file", "w") as file:
        assert "is not a socket" in complaint(words.format(file.fileno()))


@pytest.mark.parametrize("words", ["-f {}", "--server type=tcp,fd={}"])
def test_data_may_come_from_a_terminal_but_from_no_file(words: str, tmp_path: Path) -> None:
    ours, theirs = os.openpty()
    endpoints = acquired(words.format(theirs))
    stream = endpoints.data_stream
    assert stream is not None
    assert stream.fileno() == theirs
    endpoints.close()
    os.close(ours)
    with open(tmp_path / "file", "w") as file:
        fd = os.dup(file.fileno())
    with pytest.raises(UsageError, match="Given file descriptor type is not supported"):
        acquired(words.format(fd))
