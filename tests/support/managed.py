"""Commands of TPM 2.0 clients that need a resource manager, and a TPM to give them to."""

from __future__ import annotations

import hashlib
import re
import struct
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from tests.support.commands import code_of, tpm2
from vtpm_cuse.engine.libtpms import LibtpmsEngine
from vtpm_cuse.resmgr.manager import Connection, Limits, Manager
from vtpm_cuse.storage.memory import MemoryStore
from vtpm_cuse.wire.tpm import TpmSu, startup_command

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NULL: Final = 0x40000007
SHA256: Final = 0x000B
NO_NAME: Final = struct.pack(">I", 0x40000009)
PASSWORD: Final = struct.pack(">IIHBH", 9, 0x40000009, 0, 0, 0)
"""An authorization area with the empty password alone."""

NO_ROOM: Final = re.compile(
    r"0x(?:[0-9a-f]*0)?90[235]\b|TPM_RC_(?:OBJECT|SESSION)_(?:MEMORY|HANDLES)", re.IGNORECASE
)
"""What programs say when a TPM's slots for objects or sessions are all taken."""


@contextmanager
def started_engine() -> Iterator[LibtpmsEngine]:
    """A TPM 2.0 that is on and started."""
    engine = LibtpmsEngine(tpm2=True, nvram=MemoryStore())
    engine.start()
    try:
        assert code_of(engine.process(startup_command(TpmSu.TPM_SU_CLEAR, tpm2=True))) == 0
        yield engine
    finally:
        engine.stop()


@contextmanager
def managed(**limits: int) -> Iterator[Manager]:
    """A manager in front of such a TPM."""
    with started_engine() as engine:
        yield Manager(engine, limits=Limits(**limits))


def u32(*values: int) -> bytes:
    return struct.pack(f">{len(values)}I", *values)


def sized(data: bytes) -> bytes:
    return struct.pack(">H", len(data)) + data


def handle_of(response: bytes) -> int:
    assert code_of(response) == 0, response.hex()
    return int(struct.unpack_from(">I", response, 10)[0])


def start_session(kind: int = 1) -> bytes:
    """TPM2_StartAuthSession: HMAC 0, policy 1, trial 3; neither salted nor bound."""
    body = sized(bytes(16)) + sized(b"") + struct.pack(">BHH", kind, 0x10, SHA256)
    return tpm2(0x176, u32(NULL, NULL) + body)


def policy_command_code(session: int, code: int) -> bytes:
    return tpm2(0x16C, u32(session, code))


def policy_digest(session: int) -> bytes:
    return tpm2(0x189, u32(session))


def flush(handle: int) -> bytes:
    return tpm2(0x165, u32(handle))


def save(handle: int) -> bytes:
    return tpm2(0x162, u32(handle))


def load(context: bytes) -> bytes:
    return tpm2(0x161, context)


def context_in(response: bytes) -> bytes:
    """What `save` gives."""
    assert code_of(response) == 0, response.hex()
    return response[10:]


def list_handles(first: int, count: int = 254) -> bytes:
    return tpm2(0x17A, u32(1, first, count))


def listed(response: bytes) -> list[int]:
    assert code_of(response) == 0
    count = struct.unpack_from(">I", response, 15)[0]
    return list(struct.unpack_from(f">{count}I", response, 19))


def sequence_start() -> bytes:
    """TPM2_HashSequenceStart, SHA-256, empty auth."""
    return tpm2(0x186, sized(b"") + struct.pack(">H", SHA256))


def sequence_update(handle: int, data: bytes) -> bytes:
    return tpm2(0x15C, u32(handle) + PASSWORD + sized(data), sessions=True)


def sequence_complete(handle: int) -> bytes:
    return tpm2(0x13E, u32(handle) + PASSWORD + sized(b"") + u32(NULL), sessions=True)


def digest_in(response: bytes) -> bytes:
    """The first sized buffer of a response with a session's area."""
    assert code_of(response) == 0, response.hex()
    (size,) = struct.unpack_from(">H", response, 14)
    return response[16 : 16 + size]


def load_external(number: int) -> bytes:
    """TPM2_LoadExternal of an RSA public key that *number* tells apart."""
    modulus = b"\xc1" + hashlib.shake_256(u32(number)).digest(255)
    public = struct.pack(">HHIHHHHI", 1, SHA256, 0x00020040, 0, 0x10, 0x10, 2048, 0)
    public += sized(modulus[:-1] + b"\xef")
    return tpm2(0x167, sized(b"") + sized(public) + u32(NULL))


def read_public(handle: int) -> bytes:
    return tpm2(0x173, u32(handle))


def unique_of(response: bytes) -> bytes:
    """What `read_public` says that tells keys apart."""
    assert code_of(response) == 0, response.hex()
    return response[10:]


def opened(connection: Connection, command: bytes) -> int:
    """The handle that a successful command returns."""
    return handle_of(connection.process(command))


class Gapped:
    """A TPM whose saved sessions may be no more than *gap* saves apart."""

    tpm2 = True

    def __init__(self, process: Callable[[bytes], bytes], gap: int) -> None:
        self._process, self._gap = process, gap
        self._saved: dict[int, int] = {}
        self._base: int | None = None
        self.refused = 0

    def process(self, command: bytes) -> bytes:
        kind = command[6:10].hex()
        if kind == "00000162" and command[10] in {2, 3}:
            oldest = min(self._saved.values(), default=None)
            if oldest is not None and self._counter() - oldest >= self._gap:
                self.refused += 1
                return bytes.fromhex("80010000000a00000901")
        answer = self._process(command)
        if kind == "0000017a" and command[10:18] == u32(6, 0x114):
            return answer[:-4] + u32(self._gap)
        if code_of(answer) == 0 and kind == "00000162" and command[10] in {2, 3}:
            self._saved[command[11] << 16 | command[12] << 8 | command[13]] = int.from_bytes(
                answer[10:18], "big"
            )
        if code_of(answer) == 0 and kind == "00000161":
            self._saved.pop(int.from_bytes(answer[11:14], "big"), None)
        if code_of(answer) == 0 and kind == "00000144":
            self._saved.clear()
        if code_of(answer) == 0 and kind == "00000165":
            self._saved.pop(int.from_bytes(command[11:14], "big"), None)
        return answer

    def _counter(self) -> int:
        return max(self._saved.values(), default=0)

    def cancel(self) -> int:
        return 0
