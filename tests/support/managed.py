"""Commands of TPM 2.0 clients that need a resource manager, and a TPM to give them to."""

from __future__ import annotations

import hashlib
import re
import struct
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from tests.support.commands import code_of, tpm2
from vtpm_cuse.engine.libtpms import LibtpmsEngine
from vtpm_cuse.resmgr.manager import Connection, Manager
from vtpm_cuse.resmgr.quota import Limits
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


_KINDS: Final = (b"\2", b"\3")
"""The first byte of a session's handle."""
_SLOTS: Final = 3
"""Sessions that libtpms holds."""


class Gapped:
    """A TPM whose saved sessions may be no more than *gap* saves apart."""

    tpm2 = True

    def __init__(self, process: Callable[[bytes], bytes], gap: int) -> None:
        self._process, self._gap = process, gap
        self._saved: dict[int, int] = {}
        self._base: int | None = None
        self.refused = 0

    def process(self, command: bytes) -> bytes:
        code, of_session = command[6:10].hex(), command[10:11] in _KINDS
        loads = code == "00000161" and command[18:19] in _KINDS
        if ((code == "00000162" and of_session) or loads or code == "00000176") and (
            self._is_in_the_way(code, int.from_bytes(command[19:22], "big"))
        ):
            self.refused += 1
            return bytes.fromhex("80010000000a00000901")
        answer = self._process(command)
        if code == "0000017a" and command[10:18] == u32(6, 0x114):
            return answer[:-4] + u32(self._gap)
        if code_of(answer) != 0:
            return answer
        if code == "00000162" and of_session:
            index = int.from_bytes(command[11:14], "big")
            self._saved[index] = int.from_bytes(answer[10:18], "big")
        if code == "00000161" and answer[10:11] in _KINDS:
            self._saved.pop(int.from_bytes(answer[11:14], "big"), None)
        if code == "00000144":
            there = {handle & 0xFFFFFF for handle in listed(self._process(list_handles(3 << 24)))}
            self._saved = {index: self._saved[index] for index in self._saved if index in there}
        if code == "00000165" and of_session:
            self._saved.pop(int.from_bytes(command[11:14], "big"), None)
        return answer

    def _is_in_the_way(self, code: str, index: int) -> bool:
        """Whether the oldest saved session is: of a save, and where one more would take the last slot."""
        oldest = min(self._saved, key=lambda one: self._saved[one], default=None)
        if oldest is None or max(self._saved.values()) - self._saved[oldest] < self._gap:
            return False
        if code == "00000162":
            return True
        loaded = len(listed(self._process(list_handles(2 << 24))))
        return loaded == _SLOTS - 1 and not (code == "00000161" and index == oldest)

    def saved_as(self, handle: int) -> int | None:
        """The number of the newest context of a session that is saved."""
        return self._saved.get(handle & 0xFFFFFF)

    def cancel(self) -> int:
        return 0
