"""How the bytes of a control connection become requests, and which answers they get."""

from __future__ import annotations

import struct

import pytest

from tests.support import sockets as s
from tests.support.engine import FakeEngine
from tests.support.sockets import u32
from vtpm_cuse.errors import EngineError
from vtpm_cuse.proto.control import REQUEST_MAX, ControlRequest, ControlStream
from vtpm_cuse.storage.memory import MemoryStore
from vtpm_cuse.storage.sealed import SealedStore
from vtpm_cuse.vtpm import control
from vtpm_cuse.vtpm.ptm import PtmService
from vtpm_cuse.vtpm.vtpm import Vtpm, VtpmOptions
from vtpm_cuse.wire.ptm import PtmCommand

BAD_PARAMETER, FAIL, BAD_ORDINAL = u32(3), u32(9), u32(0xA)


def fed(*pieces: bytes, flush: bool = False) -> ControlRequest | None:
    """What comes out after the last piece; nothing may before."""
    stream = ControlStream()
    for piece in pieces[:-1]:
        stream.feed(piece)
        assert stream.next_request() is None
    stream.feed(pieces[-1])
    return stream.next_request(flush=flush)


def test_all_bytes_of_a_read_belong_to_one_request() -> None:
    request = fed(u32(s.GET_CONFIG, s.GET_CONFIG))
    assert request == ControlRequest(PtmCommand.PTM_GET_CONFIG, s.GET_CONFIG, u32(s.GET_CONFIG))


def test_unknown_number() -> None:
    assert fed(u32(99, 1)) == ControlRequest(None, 99, u32(1))
    assert fed(u32(0)) == ControlRequest(None, 0, b"")


@pytest.mark.parametrize(
    ("number", "body"),
    [
        (s.INIT, u32(0)),
        (s.SET_LOCALITY, b"\1"),
        (s.RESET_TPMESTABLISHED, b"\1"),
        (s.HASH_DATA, u32(3) + b"abc"),
        (s.GET_STATEBLOB, u32(0, 1, 0)),
        (s.SET_STATEBLOB, u32(0, 1, 3) + b"abc"),
        (s.SET_BUFFERSIZE, u32(0)),
        (s.GET_INFO, bytes(16)),
        (s.LOCK_STORAGE, u32(0)),
    ],
)
def test_body_may_come_in_pieces(number: int, body: bytes) -> None:
    """PEER: does not wait for the last three."""
    data = u32(number) + body
    expected = ControlRequest(PtmCommand(number - 1), number, body)
    assert fed(data) == expected
    assert fed(*(bytes([byte]) for byte in data)) == expected


def test_locality_of_four_bytes() -> None:
    assert fed(u32(s.SET_LOCALITY) + b"\3\0\0\0") == ControlRequest(
        PtmCommand.PTM_SET_LOCALITY, s.SET_LOCALITY, b"\3\0\0\0"
    )


def test_what_presses() -> None:
    stream = ControlStream()
    head = u32(s.SET_STATEBLOB, 0, 1, 9000)
    pressing = [stream.pressing]
    for piece in (head + bytes(4000), bytes(200), bytes(4800)):
        stream.feed(piece)
        request = stream.next_request()
        pressing.append(stream.pressing)
    assert pressing == [False, True, False, False], "a long blob may take its time"
    assert request is not None
    assert len(request.body) == 12 + 9000


@pytest.mark.parametrize("number", [s.SET_BUFFERSIZE, s.GET_INFO, s.LOCK_STORAGE])
def test_short_body_that_is_answered(number: int) -> None:
    assert fed(u32(number), flush=True) == ControlRequest(PtmCommand(number - 1), number, b"")


@pytest.mark.parametrize("number", [s.INIT, s.SET_LOCALITY, s.HASH_DATA, s.SET_STATEBLOB])
def test_short_body_that_is_not_answered(number: int) -> None:
    assert fed(u32(number), flush=True) is None
    assert fed(b"\0\0\0", flush=True) is None


def test_blob_that_breaks_off_is_answered_only_if_much_of_it_came() -> None:
    head = u32(s.SET_STATEBLOB, 0, 1, 9000)
    assert fed(head + bytes(4087), flush=True) is None
    assert fed(head + bytes(4088), flush=True) is not None


@pytest.mark.parametrize("number", [s.HASH_DATA, s.SET_STATEBLOB])
def test_endless_body_is_not_waited_for(number: int) -> None:
    stream = ControlStream()
    stream.feed(u32(number) + bytes(0 if number == s.HASH_DATA else 8) + u32(REQUEST_MAX))
    assert stream.next_request() is not None
    assert stream.broken


@pytest.mark.parametrize("start", [b"P", b"POST", u32(99), u32(0), b"\0\0\1"])
def test_strict_stream_is_broken_by_what_is_no_request(start: bytes) -> None:
    """Whatever stands behind it."""
    for sent in (start, start + u32(s.SHUTDOWN)):
        stream = ControlStream(strict=True)
        stream.feed(sent)
        assert stream.next_request() is None
        assert stream.broken


def test_strict_stream_takes_what_is_unknown_from_who_is_known() -> None:
    stream = ControlStream(strict=True)
    for number, command in ((s.GET_CONFIG, PtmCommand.PTM_GET_CONFIG), (99, None)):
        stream.feed(u32(number))
        assert stream.next_request() == ControlRequest(command, number, b"")
    stream.feed(b"POST")
    assert stream.next_request() is None
    assert stream.broken


def test_descriptor_may_come_with_one_request_alone() -> None:
    stream = ControlStream()
    for piece in (b"", b"\0\0", b"\0"):
        stream.feed(piece)
        assert stream.takes_descriptor
    stream.feed(u32(s.SET_STATEBLOB)[3:])
    assert stream.next_request() is None
    assert not stream.takes_descriptor


# -- answers --------------------------------------------------------------------------------


class Service:
    """A vTPM without a TPM behind it."""

    def __init__(self, *, tpm2: bool = True, running: bool = True, reject_4: bool = False) -> None:
        self.engine = FakeEngine(tpm2=tpm2)
        self.blobs = MemoryStore()
        self.vtpm = Vtpm(
            self.engine, SealedStore(self.blobs), VtpmOptions(reject_locality_4=reject_4)
        )
        self.ptm = PtmService(self.vtpm)
        if running:
            self.vtpm.start()

    def __call__(self, number: int, body: bytes = b"") -> bytes:
        request = fed(u32(number) + body, flush=True)
        assert request is not None
        return control.answer(self.vtpm, self.ptm, request)


@pytest.mark.parametrize(("tpm2", "mask"), [(True, 0x1FFFF), (False, 0x17FFF)])
def test_capability(tpm2: bool, mask: int) -> None:
    answer = Service(tpm2=tpm2, running=False)(s.GET_CAPABILITY, b"surplus")
    assert answer == u32(0, mask)
    assert struct.unpack(">Q", answer) == (mask,), "old clients read it so"


@pytest.mark.parametrize(
    ("number", "body"),
    [
        (s.SHUTDOWN, b"x"),
        (s.STOP, b"x"),
        (s.GET_TPMESTABLISHED, b"x"),
        (s.HASH_START, b"x"),
        (s.HASH_END, b"x"),
        (s.CANCEL_TPM_CMD, b"x"),
        (s.STORE_VOLATILE, b"x"),
        (s.GET_CONFIG, b"x"),
        (s.INIT, bytes(8)),
        (s.INIT, bytes(5)),
        (s.HASH_DATA, u32(3) + b"abcd"),
        (s.SET_BUFFERSIZE, b"\0\0"),
        (s.GET_INFO, bytes(15)),
        (s.LOCK_STORAGE, b""),
    ],
)
def test_wrong_length(number: int, body: bytes) -> None:
    service = Service()
    assert service(number, body) == BAD_PARAMETER
    assert service.vtpm.running, "nothing was done"


def test_blob_with_surplus() -> None:
    service = Service(running=False)
    assert service(s.SET_STATEBLOB, u32(0, 1, 3) + b"abcd") == BAD_PARAMETER
    assert service(s.SET_STATEBLOB, u32(0, 1, 513 << 10) + bytes(513 << 10)) == FAIL


@pytest.mark.parametrize(
    ("number", "body"),
    [
        (s.GET_TPMESTABLISHED, b"x"),
        (s.HASH_START, b"x"),
        (s.HASH_DATA, u32(1) + b"xx"),
        (s.HASH_END, b""),
        (s.CANCEL_TPM_CMD, b""),
        (s.STORE_VOLATILE, b""),
        (s.RESET_TPMESTABLISHED, b"\3"),
        (s.GET_STATEBLOB, u32(0, 9, 0)),
        (99, b""),
    ],
)
def test_tpm_that_is_off_says_so_whatever_the_length(number: int, body: bytes) -> None:
    assert Service(running=False)(number, body) == BAD_ORDINAL


def test_tpm_that_is_on_takes_no_state_and_no_size() -> None:
    service = Service()
    assert service(s.SET_STATEBLOB, u32(0, 1, 0)) == BAD_ORDINAL
    assert service(s.SET_BUFFERSIZE, u32(3000)) == BAD_ORDINAL
    assert service(s.SET_BUFFERSIZE, u32(0))[:4] == u32(0)


def test_established_has_eight_bytes_or_four() -> None:
    service = Service()
    assert service(s.GET_TPMESTABLISHED) == bytes(8)
    service.engine.is_established = True
    assert service(s.GET_TPMESTABLISHED) == u32(0) + b"\1\0\0\0"
    service.vtpm.stop()
    assert service(s.GET_TPMESTABLISHED) == BAD_ORDINAL


def test_reset_established_gives_the_locality_back_also_after_an_error() -> None:
    service = Service()
    assert service(s.SET_LOCALITY, b"\2") == u32(0)
    service.engine.faults["reset_established"] = EngineError("reset", 0x3D)
    assert service(s.RESET_TPMESTABLISHED, b"\3\0\0\0") == u32(0x3D)
    assert service.engine.locality == 2
    assert service(s.RESET_TPMESTABLISHED, b"\5") == u32(0x3D)
    assert service.engine.locality == 2


@pytest.mark.parametrize(("locality", "reject", "result"), [
    (0, False, 0), (4, False, 0), (4, True, 0x3D), (5, False, 0x3D), (255, False, 0x3D),
])  # fmt: skip
def test_locality_is_set_running_or_not(locality: int, reject: bool, result: int) -> None:
    for running in (True, False):
        service = Service(running=running, reject_4=reject)
        assert service(s.SET_LOCALITY, bytes([locality])) == u32(result)


def test_get_blob_counts_what_is_left() -> None:
    service = Service()
    whole = service(s.GET_STATEBLOB, u32(1, s.VOLATILE, 0))
    result, flags, total, length = struct.unpack_from(">4I", whole)
    assert (result, flags) == (0, 0)
    assert total == length == len(whole) - 16
    part = service(s.GET_STATEBLOB, u32(1, s.VOLATILE, 5))
    assert part == u32(0, 0, total - 5, total - 5) + whole[21:]
    for offset in (total, total + 1, 0xFFFFFFFF):
        assert service(s.GET_STATEBLOB, u32(1, s.VOLATILE, offset)) == bytes(16)


def test_blob_that_is_not_there() -> None:
    service = Service()
    assert service(s.GET_STATEBLOB, u32(1, s.SAVESTATE, 0)) == u32(0x800, 0, 0, 0)
    assert service(s.GET_STATEBLOB, u32(1, 9, 0)) == u32(9, 0, 0, 0)


def test_savestate_gives_the_lock_away_even_if_there_is_none() -> None:
    service = Service()
    locked = [service.blobs.locked]
    service(s.GET_STATEBLOB, u32(1, s.SAVESTATE, 0))
    locked.append(service.blobs.locked)
    service.vtpm.process(bytes.fromhex("80010000000a00000181"))
    assert [*locked, service.blobs.locked] == [True, False, True]


@pytest.mark.parametrize(
    ("number", "body"),
    [(s.STORE_VOLATILE, b""), (s.HASH_START, b""), (s.RESET_TPMESTABLISHED, b"\3")],
)
def test_nothing_is_written_without_the_lock(number: int, body: bytes) -> None:
    service = Service()
    service(s.GET_STATEBLOB, u32(1, s.SAVESTATE, 0))
    assert service(number, body) == u32(0)
    assert service.blobs.locked


def test_info_in_pieces() -> None:
    service = Service(running=False)
    service.engine.text = "x" * 5000
    first = service(s.GET_INFO, struct.pack(">QII", 1 << 40 | 7, 0, 0))
    assert first == u32(0, 5001, 3072) + b"x" * 3072
    rest = service(s.GET_INFO, struct.pack(">QII", 7, 3072, 0))
    assert rest == u32(0, 5001, 1929) + b"x" * 1928 + b"\0"
    assert service(s.GET_INFO, struct.pack(">QII", 7, 5000, 0)) == BAD_PARAMETER
