"""PTM ioctl arguments as a C client makes them; numbers and layouts from tpm_ioctl.h, written out."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from tests.support.kernel import FakeKernel, Reply

GET_CAPABILITY: Final = 0x80085000
INIT: Final = 0xC0045001
SHUTDOWN: Final = 0x80045002
GET_TPMESTABLISHED: Final = 0x80085003
SET_LOCALITY: Final = 0xC0045004
HASH_START: Final = 0x80045005
HASH_DATA: Final = 0xD0045006
HASH_END: Final = 0x80045007
CANCEL_TPM_CMD: Final = 0x80045008
STORE_VOLATILE: Final = 0x80045009
RESET_TPMESTABLISHED: Final = 0xC004500A
GET_STATEBLOB: Final = 0xCC10500B
SET_STATEBLOB: Final = 0xCC0C500C
STOP: Final = 0x8004500D
GET_CONFIG: Final = 0x8008500E
SET_DATAFD: Final = 0x8004500F
SET_BUFFERSIZE: Final = 0xC0105010
GET_INFO: Final = 0xCC105011
LOCK_STORAGE: Final = 0xC0045012

GET_CLIENTS: Final = 0xCC0C5040  # these two are ours
FLUSH_CLIENT: Final = 0xC0085041
ALL: Final = (
    GET_CAPABILITY,
    INIT,
    SHUTDOWN,
    GET_TPMESTABLISHED,
    SET_LOCALITY,
    HASH_START,
    HASH_DATA,
    HASH_END,
    CANCEL_TPM_CMD,
    STORE_VOLATILE,
    RESET_TPMESTABLISHED,
    GET_STATEBLOB,
    SET_STATEBLOB,
    STOP,
    GET_CONFIG,
    SET_DATAFD,
    SET_BUFFERSIZE,
    GET_INFO,
    LOCK_STORAGE,
    GET_CLIENTS,
    FLUSH_CLIENT,
)

PERMANENT, VOLATILE, SAVESTATE = 1, 2, 3
PART: Final = 3072


def u32(*values: int) -> bytes:
    return struct.pack(f"={len(values)}I", *values)


def result_of(reply: Reply) -> int:
    """The result in the structure given back."""
    assert reply.error == 0, reply
    return int(struct.unpack_from("=I", reply.body)[0])


def get_blob(
    kernel: FakeKernel, kind: int, offset: int = 0, flags: int = 0
) -> tuple[int, int, int, bytes]:
    """PTM_GET_STATEBLOB: result, flags, total length and the part."""
    reply = kernel.ioctl(GET_STATEBLOB, u32(flags, kind, offset))
    assert reply.error == 0
    result, out_flags, total, length = struct.unpack_from("=IIII", reply.body)
    part = reply.body[16:]
    assert len(part) == length
    return result, out_flags, total, part


def set_blob(kernel: FakeKernel, kind: int, part: bytes, length: int | None = None) -> int:
    """PTM_SET_STATEBLOB of one part; returns the result."""
    size = len(part) if length is None else length
    return result_of(kernel.ioctl(SET_STATEBLOB, u32(0, kind, size) + part))
