"""The control channel client against a server that says exactly what a test wants."""

from __future__ import annotations

import contextlib
import errno
import socket
import threading
from typing import TYPE_CHECKING, Never, Self

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.waiting import PATIENCE_SECONDS
from vtpm_cuse.client import channel, commands, connect
from vtpm_cuse.errors import AnswerError, FrontendError, VtpmError
from vtpm_cuse.wire.ptm import PtmBlobType, PtmStateFlag

if TYPE_CHECKING:
    from pathlib import Path

PERMANENT = PtmBlobType.PTM_BLOB_TYPE_PERMANENT
DECRYPTED = PtmStateFlag.PTM_STATE_FLAG_DECRYPTED


class ScriptedServer:
    """Serves one connection for each answer; keeps what it was asked."""

    def __init__(self, path: Path, *answers: bytes) -> None:
        self.path, self.asked = str(path), list[bytes]()
        self._answers = answers
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen(5)
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def _serve(self) -> None:
        for answer in self._answers:
            connection, _ = self._listener.accept()
            with connection:
                self.asked.append(connection.recv(1 << 16))
                with contextlib.suppress(ConnectionError):  # the client may have heard enough
                    for byte in answer:  # a stream may come in any pieces
                        connection.send(bytes([byte]))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(PATIENCE_SECONDS)
        self._listener.close()


def hexes(*texts: str) -> list[bytes]:
    return [bytes.fromhex(text) for text in texts]


def test_requests_and_answers_are_the_documented_bytes(tmp_path: Path) -> None:
    answers = hexes(
        "00000000 0001ffff",
        "00000000",
        "00000000 01000000",
        "00000000",
        "00000000 00000003",
        "00000000 00001000 00000af8 00001000",
    )
    with ScriptedServer(tmp_path / "s", *answers) as server:
        tpm = channel.unix_channel(server.path)
        assert tpm.capability() == 0x1FFFF
        tpm.init(1)
        assert tpm.established() == 1
        tpm.set_locality(3)
        assert tpm.config() == 3
        assert tpm.set_buffer_size(0).minsize == 2808
        tpm.close()
    assert server.asked == hexes(
        "00000001",
        "00000002 00000001",
        "00000004",
        "00000005 03000000",
        "0000000f",
        "00000011 00000000",
    )


def test_state_blobs_travel_in_one_message(tmp_path: Path) -> None:
    answers = hexes("00000000 00000000 00000003 00000003 616263", "00000000")
    with ScriptedServer(tmp_path / "s", *answers) as server:
        tpm = channel.unix_channel(server.path)
        assert tpm.get_state(PERMANENT, DECRYPTED) == b"abc"
        tpm.set_state(PERMANENT, b"xyz")
    assert server.asked == hexes(
        "0000000c 00000001 00000001 00000000",
        "0000000d 00000000 00000001 00000003 78797a",
    )


def test_long_information_comes_in_pieces(tmp_path: Path) -> None:
    answers = hexes("00000000 00000005 00000002 7b22", "00000000 00000005 00000003 227d00")
    with ScriptedServer(tmp_path / "s", *answers) as server:
        assert channel.unix_channel(server.path).info(7) == '{""}'
    assert server.asked == hexes(
        "00000012 0000000000000007 00000000 00000000",
        "00000012 0000000000000007 00000002 00000000",
    )


@pytest.mark.parametrize(
    "answer", ["0000000a", "0000000a 00000000 00000000 00000000"], ids=["short", "long"]
)
def test_a_refusal_may_be_just_the_result(tmp_path: Path, answer: str) -> None:
    with ScriptedServer(tmp_path / "s", *hexes(answer)) as server:
        tpm = channel.unix_channel(server.path)
        with pytest.raises(AnswerError, match="TPM result from PTM_GET_STATEBLOB: 0xa"):
            tpm.get_state(PERMANENT, DECRYPTED)


def test_a_server_that_hangs_up(tmp_path: Path) -> None:
    with ScriptedServer(tmp_path / "s", b"\0\0") as server:
        tpm = channel.unix_channel(server.path)
        with pytest.raises(ConnectionResetError, match="Connection reset by peer"):
            tpm.stop()


def test_a_server_that_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connect, "PATIENCE_SECONDS", 1)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen(0)
        tpm = channel.unix_channel(str(tmp_path / "s"))
        with pytest.raises(TimeoutError, match="Connection timed out"):
            tpm.stop()
        # That connection, never accepted, is all the backlog takes.
        with pytest.raises(FrontendError, match="Could not connect using UnixIO socket"):
            channel.unix_channel(str(tmp_path / "s"))


def test_tcp() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with channel.tcp_channel("localhost", port), listener.accept()[0]:
            pass
    with pytest.raises(
        FrontendError,
        match=f"Could not connect to host '127.0.0.1' on port '{port}' using TCP socket: "
        "Connection refused",
    ):
        channel.tcp_channel("127.0.0.1", port)
    with pytest.raises(FrontendError, match="getaddrinfo failed on host 'no such host': "):
        channel.tcp_channel("no such host", 1)


def test_an_address_at_which_nobody_is_is_not_the_last_word(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a machine without IPv6, whose localhost has such an address all the same."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        wanted = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))
        for other in (
            (9999, socket.SOCK_STREAM, 6, "", ("::1", port, 0, 0)),
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 1)),
        ):
            monkeypatch.setattr(
                socket, "getaddrinfo", lambda *_a, other=other, **_b: [other, wanted]
            )
            with connect.connect_tcp("localhost", port), listener.accept()[0]:
                pass


@pytest.mark.parametrize(
    ("error", "by_channel", "by_command"),
    [
        (
            BlockingIOError(errno.EINPROGRESS, "Operation now in progress"),
            "Could not connect to host 'h' on port '1' using TCP socket: Operation now in progress",
            "Could not connect using TCP socket.; timed out",
        ),
        (
            ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"),
            "Could not connect to host 'h' on port '1' using TCP socket: Connection refused",
            "Could not connect using TCP socket.; Connection refused",
        ),
    ],
    ids=["late", "nobody"],
)
def test_each_program_has_its_own_words(
    monkeypatch: pytest.MonkeyPatch, error: OSError, by_channel: str, by_command: str
) -> None:
    """Those of the C suite's programs, which scripts may know."""

    def fail(_host: str, _port: int) -> Never:
        raise error

    monkeypatch.setattr(channel, "connect_tcp", fail)
    monkeypatch.setattr(commands, "connect_tcp", fail)
    with pytest.raises(FrontendError) as caught:
        channel.tcp_channel("h", 1)
    assert str(caught.value) == by_channel
    with pytest.raises(FrontendError) as caught:
        commands.send_command(commands.TpmTcp("h", 1), b"", 1)
    assert str(caught.value) == by_command


@given(st.binary(max_size=40))
def test_any_answer_is_an_answer_or_an_error(answer: bytes) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall(answer)
        theirs.shutdown(socket.SHUT_WR)
        tpm = channel.SocketControl(lambda: ours)
        try:
            assert (
                tpm.get_state(PERMANENT, DECRYPTED) == answer[16:][: int.from_bytes(answer[12:16])]
            )
        except (VtpmError, ConnectionResetError):
            assert answer[:4] != bytes(4) or len(answer) < 16 + int.from_bytes(answer[12:16])


def test_a_state_blob_that_is_larger_than_any_is_refused_at_once(tmp_path: Path) -> None:
    """Four gigabytes would otherwise be taken into memory."""
    answer = bytes.fromhex("00000000 00000000 ffffffff ffffffff") + bytes(100)
    with ScriptedServer(tmp_path / "s", answer) as server:
        tpm = channel.unix_channel(server.path)
        with pytest.raises(AnswerError, match="Answer of 4294967295 bytes: no vTPM has more than"):
            tpm.get_state(PERMANENT, DECRYPTED)


def test_a_text_that_never_ends_is_refused(tmp_path: Path) -> None:
    answer = bytes.fromhex("00000000 7fffffff 00000001") + b"x"
    with ScriptedServer(tmp_path / "s", answer) as server:
        tpm = channel.unix_channel(server.path)
        with pytest.raises(AnswerError, match="Text of 2147483647 bytes"):
            tpm.info(1)


def test_a_text_in_endless_pieces_is_refused(tmp_path: Path) -> None:
    answer = bytes.fromhex("00000000 00008000 00000001") + b"x"
    with ScriptedServer(tmp_path / "s", *[answer] * 64) as server:
        tpm = channel.unix_channel(server.path)
        with pytest.raises(AnswerError, match="Text in more than 64 pieces"):
            tpm.info(1)


def test_an_answer_that_comes_byte_by_byte_ends_some_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "_ANSWER_SECONDS", -1)
    with ScriptedServer(tmp_path / "s", bytes(8)) as server:
        tpm = channel.unix_channel(server.path)
        with pytest.raises(TimeoutError, match="timed out"):
            tpm.config()
