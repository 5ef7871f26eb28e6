"""Targets: what comes from clients and from the kernel, and what a TPM answers to the device."""

from __future__ import annotations

import contextlib
import json
import struct
from typing import TYPE_CHECKING, Final

from tests.fuzz.pieces import pieces
from tests.support import ptm
from tests.support.kernel import Machine
from vtpm_cuse.ca.certificates import bare_certificate
from vtpm_cuse.errors import FrontendError, VtpmError, WireError
from vtpm_cuse.proto import cuse as cuse_init
from vtpm_cuse.proto import fuse as fuse_init
from vtpm_cuse.proto.control import REQUEST_MAX, ControlRequest, ControlStream
from vtpm_cuse.proto.fuse import FileOwnership, FuseSession
from vtpm_cuse.proto.stream import CommandStream, MessageStream, framed
from vtpm_cuse.vtpm import control as control_channel
from vtpm_cuse.vtpm.attributes import TpmAttributes
from vtpm_cuse.wire import blob, fuse, linear, tpm, tpm2, tpm12, vtpmx
from vtpm_cuse.wire import ptm as wire_ptm
from vtpm_cuse.wire.layout import BIG, HOST, WireStruct
from vtpm_cuse.wire.marshal import TpmStruct
from vtpm_cuse.wire.ptm import PtmCommand
from vtpm_cuse.wire.tpm import TPM_HEADER_SIZE, TpmCc, TpmOrdinal
from vtpm_cuse.wire.trace import as_json, decode, text

if TYPE_CHECKING:
    from types import ModuleType

    from vtpm_cuse.proto.device import DeviceSession
    from vtpm_cuse.vtpm.file import SavedOpen

_PREFIX_SIZE: Final = 9


# -- sockets ------------------------------------------------------------------------------


def control(data: bytes) -> None:
    """The control channel: every request has its answer, and the TPM is still there."""
    machine = Machine(tpm2=bool(data[:1] < b"\x80"), running=bool(data[:1] < b"\x40"))
    stream = ControlStream()
    for piece in (*pieces(data[1:]), None):
        stream.feed(piece or b"")
        while request := stream.next_request(flush=piece is None):
            if request.command not in {PtmCommand.PTM_SET_DATAFD, PtmCommand.PTM_LOCK_STORAGE}:
                answer = control_channel.answer(machine.vtpm, machine.ptm, request)
                assert len(answer) >= 4
            if stream.broken:
                return
        assert len(stream._buffer) <= REQUEST_MAX
    config = ControlRequest(PtmCommand.PTM_GET_CONFIG, PtmCommand.PTM_GET_CONFIG + 1, b"")
    assert len(control_channel.answer(machine.vtpm, machine.ptm, config)) == 8


def stream(data: bytes) -> None:
    """The data channel: each byte that came is in one command, once and in its order."""
    for prefix in (True, False):
        stream, came, at = CommandStream(prefix=prefix), b"", 0
        for piece in (*pieces(data), None):
            came += piece or b""
            stream.feed(piece or b"")
            while request := stream.next_request(flush=piece is None):
                if request.locality is not None:
                    assert came[at : at + 4] == b"\0\0\0\x08"
                    at += _PREFIX_SIZE
                assert request.command
                assert came[at : at + len(request.command)] == request.command
                at += len(request.command)
                assert request.command in framed(request.command, request)
        assert len(came) - at < TPM_HEADER_SIZE + _PREFIX_SIZE, "bytes are left for ever"
    message = MessageStream()
    message.feed(data)
    whole = message.next_request()
    assert (whole.command if whole else b"") == data
    assert message.next_request() is None


# -- the kernel ---------------------------------------------------------------------------


class _Mount(Machine):
    def make_session(self) -> FuseSession[SavedOpen]:
        texts = TpmAttributes(self.vtpm, self.file, lambda: b"a line\n", {"pid": 7})
        return FuseSession({"vtpm0": self.file}, texts, FileOwnership(1000, 100, 0o600, 1234567))


def cuse(data: bytes) -> None:
    """Requests of the CUSE kernel driver: an answer to each, and a device that still works."""
    with contextlib.suppress(FrontendError):
        cuse_init.init_reply(memoryview(data), "vtpm0", 0, 0)
    _kernel_talk(Machine(), data)


def fuse_mount(data: bytes) -> None:
    """Requests of the FUSE kernel driver: likewise."""
    with contextlib.suppress(FrontendError):
        fuse_init.init_reply(memoryview(data))
    _kernel_talk(_Mount(), data)


def _kernel_talk(machine: Machine, data: bytes) -> None:
    for message in pieces(data):
        with contextlib.suppress(WireError):
            reply = machine.session.receive(memoryview(bytearray(message)))
            assert len(message) >= fuse.FuseInHeader.SIZE
            if reply is not None:
                _check_reply(reply)
        if machine.file.pending is not None:
            machine.file.run_pending()
        while machine.jobs.waiting:
            # Its requests are not those of the fake kernel, which would refuse the replies.
            job, done = machine.jobs.waiting.pop(0)
            with contextlib.suppress(AssertionError):
                done(job())
    machine.file.released()
    _check_alive(machine.session, machine)


def _check_reply(reply: bytes) -> None:
    length, error, _ = struct.unpack_from("=IiQ", reply)
    assert length == len(reply)
    assert -512 < error <= 0
    assert not error or len(reply) == fuse.FuseOutHeader.SIZE


def _check_alive(session: DeviceSession[SavedOpen], machine: Machine) -> None:
    kernel = machine.kernel
    kernel.node = 2
    assert kernel.open().error == 0
    assert kernel.ioctl(ptm.GET_CONFIG).error == 0
    assert session is machine.session


# -- what a TPM answers -------------------------------------------------------------------


def attributes(data: bytes) -> None:
    """The texts beside the device, from a TPM that answers anything."""
    machine = _Mount(tpm2=bool(data[:1] < b"\x80"))
    answers = list(pieces(data[1:])) or [b""]
    codes = (
        *(TpmCc.TPM_CC_GetCapability, TpmCc.TPM_CC_PCR_Read),
        *(TpmOrdinal.TPM_ORD_GetCapability, TpmOrdinal.TPM_ORD_PcrRead),
    )
    for place, code in enumerate(codes):
        machine.engine.script[code] = answers[place % len(answers)]
    texts = TpmAttributes(machine.vtpm, machine.file, lambda: b"", {})
    for path in (*texts.files(""), *(f"{folder}/7" for folder in texts.folders())):
        with contextlib.suppress(VtpmError):
            text = texts.read(path)
            assert isinstance(text, bytes)
            text.decode("ascii")


# -- structures ---------------------------------------------------------------------------


def _all_of(kind: type, *modules: ModuleType) -> list[type]:
    found = (value for module in modules for value in vars(module).values())
    return [one for one in found if isinstance(one, type) and issubclass(one, kind) and one != kind]


_FIXED: Final[list[type[WireStruct]]] = _all_of(
    WireStruct, blob, fuse, linear, wire_ptm, tpm, vtpmx
)
_MARSHALLED: Final[list[type[TpmStruct]]] = _all_of(TpmStruct, tpm2, tpm12)


def structures(data: bytes) -> None:
    """Each structure: what was read packs to what reads the same."""
    refused: WireError | None = None
    for fixed in _FIXED:
        with contextlib.suppress(WireError):
            for order in (BIG, HOST):
                value = fixed.unpack_untrusted(data, order)
                assert fixed.unpack_untrusted(value.pack(order), order) == value
    for kind in _MARSHALLED:
        try:
            read = kind.unpack_untrusted(data)
        except WireError as exc:
            refused = exc
            continue
        assert kind.unpack_untrusted(read.pack()) == read
        return
    if refused is not None:
        raise refused


def trace(data: bytes) -> None:
    """A command and a response, which are described whatever they are."""
    command, response = (*pieces(data), b"", b"")[:2]
    record = decode(command, response, micros=1, duration=1)
    assert text(record)
    assert json.loads(json.dumps(as_json(record)))["response"]["size"] == len(response)


def responses(data: bytes) -> None:
    """Responses to TPM commands: cut up without a byte more or less."""
    for handles in (0, 1):
        with contextlib.suppress(VtpmError):
            response = tpm2.read_response_untrusted("any", data, handles=handles)
            assert response.parameters in data
            assert len(response.handles) == handles
    with contextlib.suppress(VtpmError):
        tpm2.read_public_untrusted(data[TPM_HEADER_SIZE:])
    assert bare_certificate(data) in data
    body = tpm12.read_response_untrusted("any", data)
    assert body == data[TPM_HEADER_SIZE:]
    tpm12.read_permanent_flags_untrusted(body)
