"""Clients of TCP ports that speak another protocol, above all web browsers that others have sent.

What they send has words of an attacker's in it: a TPM command in the body of a POST, say.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest

from tests.support import commands as tpm
from tests.support import sockets as s
from tests.support.sockets import RUNNING, Client, Server, u32

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

INDEX = 0x01800001
CLEAR = bytes.fromhex("80020000001b000001264000000c00000009400000090000000000")
RANDOM = tpm.get_random(8)


def post(body: bytes) -> tuple[bytes, bytes]:
    """A form's, as browsers send it: the head in one segment, a body of some length in another."""
    head = (
        b"POST / HTTP/1.1\r\nHost: 127.0.0.1:2321\r\nConnection: keep-alive\r\n"
        b"Content-Length: %d\r\nContent-Type: text/plain\r\nOrigin: null\r\n\r\n"
    )
    return head % len(body), body


FOREIGN = {
    "POST": post(CLEAR),
    "POST in one segment": (b"".join(post(CLEAR)),),
    "POST of a SHUTDOWN": post(u32(s.SHUTDOWN)),
    "POST of a prefixed command": post(u32(8) + b"\0" + u32(len(CLEAR)) + CLEAR),
    "first byte alone": (b"P", b"OST / HTTP/1.1\r\n\r\n", CLEAR),
    "GET": (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",),
    "TLS": (bytes.fromhex("16030102000100fc"), CLEAR),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", CLEAR),
    "SSH": (b"SSH-2.0-OpenSSH\r\n", CLEAR),
    "a tag with a size that no command has": (b"\x80\x02POST", CLEAR),
}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """With an NV index that goes when a TPM2_Clear is executed."""
    with Server(tmp_path, *RUNNING, data="tcp", control="tcp") as running:
        with running.data() as data:
            assert tpm.code_of(data.command(tpm.nv_define(INDEX, 8))) == 0
            assert tpm.code_of(data.command(tpm.nv_write(INDEX, b"12345678"))) == 0
        yield running


def is_untouched(server: Server) -> bool:
    with server.control() as control, server.data() as data:
        assert control.control(s.GET_CAPABILITY, size=8) == u32(0, 0x1FFFF)
        return tpm.nv_data(data.command(tpm.nv_read(INDEX, 8))) == b"12345678"


def say(client: Client, pieces: tuple[bytes, ...]) -> None:
    """Piece after piece, as far as the server lets."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for piece in pieces:
            client.send(piece)


def test_a_clear_takes_the_index_away(server: Server) -> None:
    """So that the tests below can fail."""
    with server.data() as data:
        assert tpm.code_of(data.command(CLEAR)) == 0
        assert tpm.code_of(data.command(tpm.nv_read(INDEX, 8))) != 0


@pytest.mark.parametrize("pieces", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("channel", ["data", "control"])
def test_another_protocol_ends_the_connection_and_nothing_in_it_is_executed(
    server: Server, channel: str, pieces: tuple[bytes, ...]
) -> None:
    with server.data() if channel == "data" else server.control() as client:
        say(client, pieces)
        assert client.rest() == b""
    assert is_untouched(server)
    assert "does not speak this protocol" in server.log_text()


def test_request_that_nobody_knows_first(server: Server) -> None:
    """Over TCP it ends the connection; behind one that is known it is answered."""
    with server.control() as client:
        client.send(u32(99))
        assert client.rest() == b""
    with server.control() as client:
        assert client.control(s.GET_CAPABILITY, size=8) == u32(0, 0x1FFFF)
        assert client.result(99) == 0xA
        client.send(b"POST")
        assert client.rest() == b""


@pytest.mark.parametrize("surplus", [b"\n", b"GET / HTTP/1.1\r\n"])
def test_surplus_behind_a_command(server: Server, surplus: bytes) -> None:
    """Nobody can tell where the next command begins: neither the one before is executed."""
    with server.data() as client:
        assert tpm.code_of(client.command(RANDOM)) == 0
        say(client, (CLEAR + surplus,))
        assert client.rest() == b""
    assert is_untouched(server)


def test_command_that_breaks_off_is_the_last(server: Server) -> None:
    """What comes later could be anything."""
    with server.data() as client:
        assert client.command(CLEAR[:12]).hex() == "80010000000a00000142"
        say(client, (CLEAR[12:],))
        assert client.rest() == b""
    assert is_untouched(server)


def test_commands_and_requests_of_all_kinds_pass(server: Server) -> None:
    with server.data() as client:
        for command in (RANDOM, bytes.fromhex("00c10000000a000000f1"), tpm.nv_read(INDEX, 8)):
            assert client.command(command)
        client.send(u32(8) + b"\0" + u32(len(RANDOM)) + RANDOM)
        assert len(client.exactly(28)) == 28
        client.send(RANDOM * 3)
        for _ in range(3):
            assert tpm.code_of(client.response()) == 0
        for byte in RANDOM:
            client.send(bytes([byte]))
        assert tpm.code_of(client.response()) == 0
