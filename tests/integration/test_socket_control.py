"""The control channel of `swtpm socket`: connections, time limits, resets, descriptors."""

from __future__ import annotations

import array
import contextlib
import socket
import struct
from typing import TYPE_CHECKING

import pytest

from tests.support import commands as tpm
from tests.support import sockets as s
from tests.support.sockets import NOT_NEED_INIT, RUNNING, Client, Server, u32

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("warm")

CLOCK = tpm.TPM2_READ_CLOCK
RANDOM = tpm.get_random(8)
OFF_2 = "80010000000a00000101"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("s"), *RUNNING) as running:
        yield running


@pytest.fixture
def control(server: Server) -> Iterator[Client]:
    with server.control() as connected:
        yield connected


# -- connections and time -------------------------------------------------------------------


def test_all_bytes_of_a_read_are_one_request(control: Client) -> None:
    assert control.result(s.GET_CONFIG, u32(s.GET_CONFIG)) == 3
    assert control.control(s.GET_CAPABILITY, u32(s.GET_CAPABILITY), 8) == u32(0, 0x1FFFF)
    assert control.control(s.GET_CONFIG, size=8) == bytes(8), "nothing is left over"


def test_unknown_request(server: Server, control: Client) -> None:
    assert control.result(0) == 0xA
    assert control.result(20, bytes(500)) == 0xA
    assert "Error: Unknown command: 0x00000014" in server.log_text()


@pytest.mark.parametrize("sent", [b"\0", b"\0\0\0", u32(s.INIT), u32(s.HASH_DATA, 3) + b"ab"])
def test_incomplete_request_ends_the_connection_without_an_answer(
    server: Server, sent: bytes
) -> None:
    with server.control() as client:
        client.send(sent)
        assert client.rest() == b""


def test_request_that_trickles_ends_the_connection(server: Server) -> None:
    with server.control() as client:
        client.send(u32(s.SET_STATEBLOB, 0, 1, 4000))
        while not s.readable(client.socket, 0.02):
            with contextlib.suppress(BrokenPipeError):
                client.send(b"x")
        assert client.rest() == b""


def test_short_body_that_is_answered_all_the_same(control: Client) -> None:
    for number in (s.SET_BUFFERSIZE, s.GET_INFO, s.LOCK_STORAGE):
        assert control.result(number) == 3


def test_body_in_a_write_of_its_own(control: Client) -> None:
    """QEMU sends state blobs so. The C suite does not take the last three."""
    for number, body, size in (
        (s.SET_LOCALITY, b"\0", 4),
        (s.SET_LOCALITY, b"\0\0\0\0", 4),
        (s.HASH_DATA, u32(9) + b"123456789", 4),
        (s.SET_BUFFERSIZE, u32(0), 16),
        (s.LOCK_STORAGE, u32(0), 4),
        (s.GET_INFO, struct.pack(">QII", 1, 0, 0), 12),
    ):
        control.send(u32(number))
        control.send(body)
        answer = control.answer(size)
        assert answer[:4] == bytes(4)
        assert len(answer) == size
        if number == s.GET_INFO:
            control.exactly(int.from_bytes(answer[8:12], "big"))


def test_long_hash_data(control: Client) -> None:
    assert control.result(s.HASH_START) == 0
    assert control.result(s.HASH_DATA, u32(300_000) + bytes(300_000)) == 0
    assert control.result(s.HASH_END) == 0


def test_endless_hash_data_is_refused(server: Server) -> None:
    with server.control() as client:
        client.send(u32(s.HASH_DATA, 0xFFFFFFFF))
        assert client.rest() == u32(3)


def test_blob_that_breaks_off(server: Server) -> None:
    for length, expected in ((4000, b""), (6000, u32(0xA))):
        with server.control() as client:
            client.send(u32(s.SET_STATEBLOB, 0, 1, 9000) + bytes(length))
            client.socket.shutdown(socket.SHUT_WR)
            assert client.rest() == expected


def test_second_client_is_answered_at_once(server: Server) -> None:
    """PEER: lets it wait for the end of the first."""
    with server.control() as first, server.control() as second, server.control() as third:
        third.send(b"\0\0")
        for client in (first, second, first):
            assert client.control(s.GET_CAPABILITY, size=8) == u32(0, 0x1FFFF)


def test_half_a_tpm_command_does_not_delay_control(server: Server) -> None:
    with server.data() as data, server.control() as control:
        data.send(RANDOM[:9])
        assert control.control(s.GET_CAPABILITY, size=8) == u32(0, 0x1FFFF)
        data.send(RANDOM[9:])
        assert tpm.code_of(data.response()) == 0


@pytest.mark.parametrize("kind", ["tcp", "unixio"])
@pytest.mark.parametrize("how", ["close", "time limit"])
def test_terminate_with_the_control_connection(kind: str, how: str, tmp_path: Path) -> None:
    port, path = s.free_ports(), tmp_path / "ctrl"
    where = f"port={port}" if kind == "tcp" else f"path={path}"
    options = ("--ctrl", f"type={kind},{where},terminate")
    with Server(tmp_path, *RUNNING, *options, control=None) as server:
        with server.data() as data:
            data.command(RANDOM)
        with s.connect(port if kind == "tcp" else path) as client:
            client.control(s.GET_CAPABILITY, size=8)
            if how == "time limit":
                client.send(b"\0")
                assert client.ended()
        assert server.wait() == 0
        assert not path.exists()


def test_client_that_goes_ends_nothing_without_terminate(server: Server) -> None:
    for _ in range(3):
        assert server.request(s.GET_CONFIG, size=8) == bytes(8)


@pytest.mark.parametrize("terminate", ["", ",terminate"])
def test_passed_client(terminate: str, tmp_path: Path) -> None:
    with s.socket_pair() as (client, theirs):
        fd = theirs.fileno()
        options = ("--ctrl", f"type=unixio,clientfd={fd}{terminate}")
        with Server(tmp_path, *RUNNING, *options, control=None, pass_fds=[fd]) as server:
            theirs.close()
            assert client.control(s.GET_CAPABILITY, size=8) == u32(0, 0x1FFFF)
            client.close()
            if terminate:
                assert server.wait() == 0
            else:
                with server.data() as data:
                    assert tpm.code_of(data.command(RANDOM)) == 0


def test_shutdown_answers_then_ends_everything(tmp_path: Path) -> None:
    with Server(tmp_path, *RUNNING) as server, server.data() as data, server.control() as control:
        data.command(RANDOM)
        assert control.result(s.SHUTDOWN) == 0
        assert control.ended()
        assert data.ended()
        assert server.wait() == 0


# -- state machine --------------------------------------------------------------------------


def test_stop_and_buffer_size_before_init(tmp_path: Path) -> None:
    """QEMU's way to begin: STOP before each SET_BUFFERSIZE, the query included."""
    with Server(tmp_path) as server, server.control() as control, server.data() as data:
        for wanted, got in ((0, 4096), (3000, 3000), (1, 0xAF8), (9999, 4096), (3000, 3000)):
            assert control.result(s.STOP) == 0
            answer = control.control(s.SET_BUFFERSIZE, u32(wanted), 16)
            assert answer == u32(0, got, 0xAF8, 4096)
        assert control.result(s.INIT, u32(0)) == 0
        assert data.command(tpm.TPM2_STARTUP_CLEAR)
        largest = tpm.tpm2(0x17A, u32(6, 0x11E, 1))
        assert data.command(largest)[-4:] == u32(3000)
        assert control.result(s.SET_BUFFERSIZE, u32(4096)) == 0xA
        too_large = RANDOM[:2] + u32(3001, 0x17B) + bytes(2991)
        assert tpm.code_of(data.command(too_large)) == 0x142
        assert server.init() == 0
        assert control.control(s.SET_BUFFERSIZE, u32(0), 16)[4:8] == u32(3000), "it survives INIT"


def test_init_with_a_wrong_length(tmp_path: Path) -> None:
    with Server(tmp_path) as server, server.control() as control:
        assert control.result(s.INIT, bytes(8)) == 3
        assert control.result(s.GET_TPMESTABLISHED) == 0xA
        assert control.result(s.INIT, bytes(4)) == 0
        assert control.control(s.GET_TPMESTABLISHED, size=8) == bytes(8)


def test_locality_survives_init_stop_and_disconnects(tmp_path: Path) -> None:
    """QEMU sends it only when it changes. TPM2_Startup in locality 1 shows it."""
    with Server(tmp_path) as server:
        assert server.request(s.SET_LOCALITY, b"\1") == bytes(4)
        assert server.init() == 0
        with server.data() as data:
            assert tpm.code_of(data.command(tpm.TPM2_STARTUP_CLEAR)) == 0x907
            assert server.request(s.STOP) == bytes(4)
            assert server.init(1) == 0
            assert tpm.code_of(data.command(tpm.TPM2_STARTUP_CLEAR)) == 0x907
            assert server.request(s.SET_LOCALITY, b"\0") == bytes(4)
            assert tpm.code_of(data.command(tpm.TPM2_STARTUP_CLEAR)) == 0


@pytest.mark.parametrize("tpm2", [True, False])
def test_established(tpm2: bool, tmp_path: Path) -> None:
    with Server(tmp_path, *RUNNING, tpm2=tpm2) as server, server.control() as control:
        for number, body in (
            (s.HASH_START, b""),
            (s.HASH_DATA, u32(3) + b"abc"),
            (s.HASH_END, b""),
        ):
            assert control.result(number, body) == 0
        assert server.init() == 0
        assert control.control(s.GET_TPMESTABLISHED, size=8) == u32(0) + b"\1\0\0\0"
        for locality, result in ((0, 0x3D), (2, 0x3D), (5, 0x3D), (255, 0x3D), (3, 0)):
            assert control.result(s.RESET_TPMESTABLISHED, bytes([locality])) == result
        assert control.control(s.GET_TPMESTABLISHED, size=8) == bytes(8)


def test_tpm12_hash_sequence_has_rules(tmp_path: Path) -> None:
    with (
        Server(tmp_path, *NOT_NEED_INIT, tpm2=False) as server,
        server.control() as control,
        server.data() as data,
    ):
        assert control.result(s.HASH_START) == 0x26, "before Startup"
        assert tpm.code_of(data.command(tpm.TPM12_STARTUP_CLEAR)) == 0x1C, "until next INIT"
        assert control.result(s.INIT, u32(0)) == 0
        assert tpm.code_of(data.command(tpm.TPM12_STARTUP_CLEAR)) == 0
        assert control.result(s.HASH_END) == 0x1A


def test_tpm2_hash_sequence_before_and_after_startup(tmp_path: Path) -> None:
    def measure(control: Client) -> None:
        assert control.result(s.HASH_DATA, u32(3) + b"abc") == 0, "without START nothing happens"
        assert control.result(s.HASH_START) == 0
        assert control.result(s.HASH_DATA, u32(3) + b"abc") == 0
        assert control.result(s.HASH_END) == 0

    with (
        Server(tmp_path, *NOT_NEED_INIT) as server,
        server.control() as control,
        server.data() as data,
    ):
        measure(control)
        assert tpm.code_of(data.command(tpm.TPM2_STARTUP_CLEAR)) == 0
        first = tpm.pcr_value(data.command(tpm.pcr_read(0)))
        assert first not in {bytes(32), b"\0" * 31 + b"\4"}
        before = tpm.pcr_value(data.command(tpm.pcr_read(17)))
        assert before == b"\xff" * 32
        measure(control)
        assert tpm.pcr_value(data.command(tpm.pcr_read(17))) not in {before, bytes(32)}
        assert tpm.pcr_value(data.command(tpm.pcr_read(18))) == bytes(32)
        assert tpm.pcr_value(data.command(tpm.pcr_read(0))) == first


@pytest.mark.parametrize(("tpm2", "result"), [(True, 0), (False, 9)])
def test_cancel_between_commands(tpm2: bool, result: int, tmp_path: Path) -> None:
    with Server(tmp_path, *RUNNING, tpm2=tpm2) as server, server.data() as data:
        assert server.request(s.CANCEL_TPM_CMD) == u32(result)
        if tpm2:
            assert tpm.code_of(data.command(RANDOM)) == 0


# -- TPM2_Shutdown before the power goes ----------------------------------------------------


@pytest.mark.parametrize(
    ("last", "flags", "code"),
    [
        ("", "", 0),
        ("", ",disable-auto-shutdown", 0x1C4),
        (tpm.TPM2_SHUTDOWN_CLEAR.hex(), "", 0x1C4),
        (tpm.TPM2_SHUTDOWN_STATE.hex(), "", 0),
        ("80010000000c000001450009", "", 0x1C4),
        (tpm.TPM2_SHUTDOWN_CLEAR.hex() + RANDOM.hex(), "", 0),
    ],
    ids=["none", "disabled", "clear", "state", "bad", "clear, then another"],
)
def test_automatic_shutdown(last: str, flags: str, code: int, tmp_path: Path) -> None:
    """Seen by TPM2_Startup(STATE) after a reset: only an orderly end lets it succeed."""
    words = ("--flags", f"startup-clear{flags}")
    with Server(tmp_path, *words) as server, server.data() as data, server.control() as control:
        data.command(RANDOM)
        if last:
            data.send(bytes.fromhex(last))
            data.response()
            if RANDOM.hex() in last:
                data.response()
        assert control.result(s.INIT, u32(0)) == 0
        assert tpm.code_of(data.command(tpm.TPM2_STARTUP_STATE)) == code


# -- descriptors ----------------------------------------------------------------------------


def test_set_datafd(tmp_path: Path) -> None:
    with Server(tmp_path, data=None) as server, server.control() as control:
        assert control.result(s.SET_DATAFD) == 3
        assert "no valid data socket in message" in server.log_text()
        with s.socket_pair() as (data, theirs):
            assert control.set_data_fd(theirs.fileno()) == 0
            theirs.close()
            assert data.command(CLOCK).hex() == OFF_2
            with s.socket_pair() as (_, other):
                assert control.set_data_fd(other.fileno()) == 0x1F
            assert control.result(s.SET_DATAFD) == 0x1F, "a data connection exists: asked first"
        for _ in range(20):
            with s.socket_pair() as (data, theirs):
                assert control.set_data_fd(theirs.fileno()) == 0, "after the last has hung up"
                theirs.close()
                assert data.command(CLOCK).hex() == OFF_2


def test_descriptors_of_a_request_in_pieces_are_kept_and_closed(tmp_path: Path) -> None:
    with Server(tmp_path, data=None) as server, server.control() as control:
        assert control.result(s.SET_DATAFD) == 3
        before = server.descriptors()
        for at_once in (1, 2, 3):
            with s.socket_pair() as (data, theirs):
                surplus = [theirs.fileno()] * 15
                assert control.set_data_fd(theirs.fileno(), *surplus, at_once=at_once) == 0
                theirs.close()
                assert data.command(CLOCK).hex() == OFF_2
        with s.socket_pair() as (_, theirs), server.control() as gone:
            rights = array.array("i", [theirs.fileno()] * 8).tobytes()
            for byte in s.SET_DATAFD.to_bytes(4)[:3]:
                gone.socket.sendmsg(
                    [bytes([byte])], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]
                )
        server.settle(before)


@pytest.mark.parametrize("data", ["tcp", "unixio"])
def test_set_datafd_beside_a_server(data: str, tmp_path: Path) -> None:
    with (
        Server(tmp_path, data=data) as server,
        server.control() as control,
        s.socket_pair() as (_, theirs),
    ):
        assert control.set_data_fd(theirs.fileno()) == 0x1F


def test_set_datafd_of_something_else(tmp_path: Path) -> None:
    with (
        Server(tmp_path, data=None) as server,
        server.control() as control,
        open(tmp_path / "file", "w") as file,
    ):
        assert control.set_data_fd(file.fileno()) == 3


def test_no_descriptor_stays(tmp_path: Path) -> None:
    """Refused ones, surplus ones, and those that come with another request."""
    with Server(tmp_path) as server, server.control() as control:
        control.control(s.GET_CAPABILITY, size=8)
        before = server.descriptors()
        with s.socket_pair() as (_, theirs):
            for _ in range(30):
                assert control.set_data_fd(theirs.fileno()) == 0x1F
                assert control.set_data_fd(*[theirs.fileno()] * 5, number=s.CANCEL_TPM_CMD) == 0xA
        assert server.descriptors() == before


def test_terminate_with_a_passed_data_connection(tmp_path: Path) -> None:
    with Server(tmp_path, "-t", data=None) as server, server.control() as control:
        with s.socket_pair() as (data, theirs):
            assert control.set_data_fd(theirs.fileno()) == 0
            theirs.close()
            assert data.command(CLOCK).hex() == OFF_2
        assert server.wait() == 0
