"""The data channel of `swtpm socket`: framing, connections, refusals."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest

from tests.support import commands as tpm
from tests.support import sockets as s
from tests.support.sockets import RUNNING, Client, Server, u32

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("warm")

CLOCK = tpm.TPM2_READ_CLOCK
RANDOM = tpm.get_random(8)
TPM12_CAPABILITIES = bytes.fromhex("00c10000001200000065000000060000 0000")
SET_LOCALITY = bytes.fromhex("80020000000b20001000")
RESET_PCR_20 = bytes.fromhex("80020000001b0000013d0000001400000009400000090000000000")

OFF_2, OFF_12 = "80010000000a00000101", "00c40000000a00000009"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A TPM 2 that has been started up; tests may use it, but not change what others see."""
    with Server(tmp_path_factory.mktemp("s"), *RUNNING) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with server.data() as connected:
        yield connected


def is_random(response: bytes) -> bool:
    return len(response) == 20 and tpm.code_of(response) == 0


def said(server: Server, data: bytes) -> str:
    """What comes back for *data* when nothing follows it."""
    with server.data() as client:
        client.send(data)
        client.socket.shutdown(socket.SHUT_WR)
        return client.rest().hex()


# -- framing --------------------------------------------------------------------------------


def test_command_in_pieces(client: Client) -> None:
    for byte in RANDOM:
        client.send(bytes([byte]))
    assert is_random(client.response())


def test_two_commands_in_one_write(client: Client) -> None:
    client.send(RANDOM + CLOCK)
    assert is_random(client.response())
    assert len(client.response()) > 20


def test_hundred_commands_in_one_write(client: Client) -> None:
    client.send(RANDOM * 100)
    for _ in range(100):
        assert is_random(client.response())


@pytest.mark.parametrize("surplus", [b"x", b"\n", b"more than a header"])
def test_surplus_gets_one_error_and_the_stream_goes_on(client: Client, surplus: bytes) -> None:
    assert client.command(RANDOM + surplus).hex() == "80010000000a00000142"
    assert is_random(client.command(RANDOM))


@pytest.mark.parametrize("size", [0, 9, 4097, 0xFFFFFFFF])
def test_impossible_size_gets_one_error(client: Client, size: int) -> None:
    bad = RANDOM[:2] + u32(size) + RANDOM[6:]
    assert client.command(bad).hex() == "80010000000a00000142"
    assert is_random(client.command(RANDOM))


def test_size_beyond_what_comes_is_answered_after_a_while(client: Client) -> None:
    assert client.command(CLOCK[:2] + u32(40) + CLOCK[6:]).hex() == "80010000000a00000142"
    assert is_random(client.command(RANDOM))


def test_bad_tag_is_answered_as_a_tpm2(client: Client) -> None:
    assert client.command(b"\0\5" + RANDOM[2:]).hex() == "80010000000a00000084"


def test_largest_command_and_more(client: Client) -> None:
    assert client.command(RANDOM[:2] + u32(4096, 0x17B) + bytes(4086)).hex()[-3:] != "142"
    for size in (4097, 4105):
        big = RANDOM[:2] + u32(size, 0x17B) + bytes(size - 10)
        assert client.command(big).hex() == "80010000000a00000142"
    assert is_random(client.command(RANDOM))


def test_end_of_stream_in_a_command(server: Server) -> None:
    assert said(server, RANDOM[:9]) == ""
    assert said(server, RANDOM[:11]) == "80010000000a00000142"


def test_pending_command_is_answered_after_a_half_close(server: Server) -> None:
    assert is_random(bytes.fromhex(said(server, RANDOM)))


def test_client_that_goes_before_the_answer(server: Server) -> None:
    for sent in (RANDOM, RANDOM[:5], RANDOM * 50, b""):
        with server.data() as client:
            client.send(sent)
    with server.data() as client:
        assert is_random(client.command(RANDOM))


# -- the send-command prefix ----------------------------------------------------------------


def prefixed(locality: int, command: bytes, length: int | None = None) -> bytes:
    size = len(command) if length is None else length
    return u32(8) + bytes([locality]) + u32(size) + command


def test_prefix_and_trailer(client: Client) -> None:
    client.send(prefixed(0, RANDOM))
    assert client.exactly(4) == u32(20)
    assert is_random(client.exactly(20))
    assert client.exactly(4) == bytes(4)


def test_prefix_in_three_writes(client: Client) -> None:
    for piece in (u32(8), b"\0", u32(12), RANDOM):
        client.send(piece)
    assert is_random(client.exactly(28)[4:24])


def test_length_in_the_prefix_is_ignored(client: Client) -> None:
    client.send(prefixed(0, RANDOM, 0xFFFFFFFF))
    assert is_random(client.exactly(28)[4:24])


def test_errors_are_framed_too(server: Server, client: Client) -> None:
    client.send(prefixed(0, b"\0\5" + RANDOM[2:]))
    assert client.exactly(18) == u32(10) + bytes.fromhex("80010000000a00000084") + bytes(4)
    client.close()  # one client at a time
    assert said(server, prefixed(0, RANDOM[:5])) == "0000000a" + "80010000000a0000009a" + "00000000"


@pytest.mark.parametrize(("option", "refused"), [((), 5), (("--locality", "reject-locality-4"), 4)])
def test_locality_of_a_prefix_is_checked_and_stays(
    tmp_path: Path, option: tuple[str, ...], refused: int
) -> None:
    """Visible in PCR_Reset of PCR 20, which localities 2 and 4 may."""
    with Server(tmp_path, *RUNNING, *option) as server:
        with server.data() as client:
            assert tpm.code_of(client.command(RESET_PCR_20)) == 0x907
            client.send(prefixed(2, RANDOM))
            client.exactly(28)
        with server.data() as client:
            assert tpm.code_of(client.command(RESET_PCR_20)) == 0
            for locality in (refused, 17, 32, 255):
                client.send(prefixed(locality, RANDOM))
                assert client.exactly(18)[4:14] == bytes.fromhex("80010000000a00000107")
            assert tpm.code_of(client.command(RESET_PCR_20)) == 0


# -- a TPM that is off ----------------------------------------------------------------------


@pytest.mark.parametrize(("tpm2", "answer"), [(True, OFF_2), (False, OFF_12)])
def test_version_probe_of_qemu(tpm2: bool, answer: str, tmp_path: Path) -> None:
    """The tag tells the version, whatever the tag of the question."""
    with Server(tmp_path, tpm2=tpm2) as server, server.data() as client:
        for probe in (CLOCK, bytes.fromhex("00c10000000a000000f1")):
            client.send(probe)
            assert client.socket.recv(4096).hex() == answer, "in one piece"
        assert server.init() == 0
        assert client.command(CLOCK).hex() != answer, "the connection survives INIT"
        assert server.request(s.STOP) == bytes(4)
        assert client.command(CLOCK).hex() == answer
        if tpm2:
            client.send(prefixed(0, CLOCK))
            assert client.exactly(18).hex() == f"0000000a{answer}00000000"


def test_tpm12(tmp_path: Path) -> None:
    with Server(tmp_path, *RUNNING, tpm2=False) as server, server.data() as client:
        assert tpm.code_of(client.command(tpm.tpm12_pcr_read(0))) == 0
        assert client.command(prefixed(0, TPM12_CAPABILITIES)).hex() == "00c40000000a00000019"
        assert client.command(TPM12_CAPABILITIES + b"xyz").hex() == "00c40000000a00000019"
        bad_size = TPM12_CAPABILITIES[:2] + u32(5000) + TPM12_CAPABILITIES[6:]
        assert client.command(bad_size).hex() == "00c40000000a00000019"
        assert tpm.code_of(client.command(bytes(20000))) != 0


def test_set_locality_command(tmp_path: Path) -> None:
    with Server(tmp_path / "a", *RUNNING) as server, server.data() as client:
        assert client.command(SET_LOCALITY + b"\1").hex() == OFF_2, "not allowed"
    words = ("--locality", "reject-locality-4,allow-set-locality")
    with Server(tmp_path / "b", *RUNNING, *words) as server, server.data() as client:
        for locality, code in ((0, 0), (3, 0), (4, 0x107), (5, 0x107)):
            for tag in (b"\x80\x02", b"\x80\x01", b"\0\xc1"):
                answer = client.command(tag + SET_LOCALITY[2:] + bytes([locality]))
                assert answer == bytes.fromhex("80010000000a") + u32(code)
        assert tpm.code_of(client.command(b"\x80\x01" + u32(10, 0x20001000))) == 0x9A


# -- connections ----------------------------------------------------------------------------


def test_next_client_is_served_when_the_one_before_goes(server: Server) -> None:
    first = server.data()
    waiting = [server.data() for _ in range(3)]
    for client in waiting:
        client.send(RANDOM)
    assert is_random(first.command(RANDOM)), "the first still has its turn"
    assert not any(s.readable(client.socket) for client in waiting)
    first.close()
    for client in waiting:
        assert is_random(client.response())
        client.close()


@pytest.mark.parametrize("kind", ["tcp", "unixio"])
def test_new_connections_for_every_command(kind: str, tmp_path: Path) -> None:
    """As tpm2-tss does."""
    with Server(tmp_path, *RUNNING, data=kind, control=kind) as server:
        server.request(s.GET_CAPABILITY, size=8)
        before = server.descriptors()
        for locality in range(200):
            with server.control() as control, server.data() as data:
                assert control.result(s.SET_LOCALITY, bytes([locality % 4])) == 0
                assert is_random(data.command(RANDOM))
        server.settle(before)


def test_disconnect(tmp_path: Path) -> None:
    port = s.free_ports()
    with Server(tmp_path, *RUNNING, "-p", str(port), data=None) as server:
        server.request(s.GET_CAPABILITY, size=8)
        for _ in range(3):
            with s.connect(port) as client:
                assert is_random(client.command(RANDOM))
                assert client.ended()
        with s.connect(port) as client:
            client.send(RANDOM[:2] + u32(40) + RANDOM[6:])
            assert tpm.code_of(client.response()) == 0x142
            assert client.ended()


@pytest.mark.parametrize("kind", ["tcp", "unixio"])
def test_terminate_with_the_data_connection(kind: str, tmp_path: Path) -> None:
    with Server(tmp_path, *RUNNING, "-t", data=kind) as server:
        server.request(s.GET_CAPABILITY, size=8)  # no data connection yet
        with server.data() as client:
            assert is_random(client.command(RANDOM))
            assert is_random(client.command(RANDOM))
        assert server.wait() == 0


@pytest.mark.parametrize("words", [["--fd", "{}"], ["--server", "type=tcp,fd={}"]])
def test_passed_connection_is_the_life_of_the_server(words: list[str], tmp_path: Path) -> None:
    with s.socket_pair() as (client, theirs):
        fd = theirs.fileno()
        given = [word.format(fd) for word in words]
        with Server(tmp_path, *RUNNING, *given, data=None, pass_fds=[fd]) as server:
            theirs.close()
            assert is_random(client.command(RANDOM))
            client.close()
            assert server.wait() == 0


def test_long_command_does_not_delay_control(tmp_path: Path) -> None:
    """And can be cancelled by it."""
    with Server(tmp_path, *RUNNING) as server, server.data() as data, server.control() as control:
        data.send(tpm.create_primary_rsa())
        while not s.readable(data.socket):
            assert len(control.control(s.GET_CAPABILITY, size=8)) == 8
            assert control.result(s.CANCEL_TPM_CMD) == 0
        assert tpm.code_of(data.response()) in {0, 0x909}
        assert is_random(data.command(RANDOM))
