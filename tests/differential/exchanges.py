"""An exchange is one message and what comes back; a session is many of them, one after the other.

The name of an exchange says where a difference is; names are unique within a session.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable


class Way(Enum):
    """How the message travels."""

    DATA = "data, on a connection that stays"
    DATA_END = "data, then the end of the stream; the answer is all that comes back"
    DATA_PARTS = "data in two reads of the server, then the end of the stream"
    CONTROL = "control, then the end of the stream; the answer is all that comes back"


@dataclass(frozen=True)
class Exchange:
    """One message.

    Attributes:
        send: The message, or what makes it from the session's answers so far, by name.
        cut: Where `Way.DATA_PARTS` cuts.
    """

    name: str
    way: Way
    send: bytes | Callable[[dict[str, bytes]], bytes]
    cut: int = 0


@dataclass(frozen=True)
class Session:
    """What one run of the server is asked, from its start to its end."""

    name: str
    tpm2: bool
    exchanges: tuple[Exchange, ...]
    flags: tuple[str, ...] = ()
    locality: tuple[str, ...] = ()
    migration_key: bool = False
    file_key: bool = False


def version(*, tpm2: bool) -> str:
    return "TPM 2" if tpm2 else "TPM 1.2"


def u32(*values: int) -> bytes:
    return struct.pack(f">{len(values)}I", *values)


# -- messages -----------------------------------------------------------------------------

GET_CAPABILITY, INIT, SHUTDOWN, GET_ESTABLISHED, SET_LOCALITY = 1, 2, 3, 4, 5
HASH_START, HASH_DATA, HASH_END, CANCEL, STORE_VOLATILE = 6, 7, 8, 9, 0xA
RESET_ESTABLISHED, GET_BLOB, SET_BLOB, STOP, GET_CONFIG = 0xB, 0xC, 0xD, 0xE, 0xF
SET_DATAFD, SET_BUFFERSIZE, GET_INFO, LOCK_STORAGE = 0x10, 0x11, 0x12, 0x13
PERMANENT, VOLATILE, SAVESTATE = 1, 2, 3

BODIES: Final = {
    GET_CAPABILITY: 0,
    INIT: 4,
    GET_ESTABLISHED: 0,
    SET_LOCALITY: 1,
    HASH_START: 0,
    HASH_DATA: 4,
    HASH_END: 0,
    CANCEL: 0,
    STORE_VOLATILE: 0,
    RESET_ESTABLISHED: 1,
    GET_BLOB: 12,
    SET_BLOB: 12,
    STOP: 0,
    GET_CONFIG: 0,
    SET_DATAFD: 0,
    SET_BUFFERSIZE: 4,
    GET_INFO: 16,
    LOCK_STORAGE: 4,
}
"""Control command to the bytes of body it must have."""


def ptm(command: int, body: bytes = b"") -> bytes:
    """A control message."""
    return struct.pack(">I", command) + body


def get_blob(kind: int, *, decrypted: bool = False, offset: int = 0) -> bytes:
    return ptm(GET_BLOB, struct.pack(">III", decrypted, kind, offset))


def set_blob(kind: int, blob: bytes, flags: int = 0) -> bytes:
    return ptm(SET_BLOB, struct.pack(">III", flags, kind, len(blob)) + blob)


def get_info(flags: int, offset: int = 0) -> bytes:
    return ptm(GET_INFO, struct.pack(">QII", flags, offset, 0))


def hash_data(data: bytes) -> bytes:
    return ptm(HASH_DATA, struct.pack(">I", len(data)) + data)


def prefixed(locality: int, command: bytes, announced: int | None = None) -> bytes:
    """A TPM 2 command with the send-command header."""
    length = len(command) if announced is None else announced
    return struct.pack(">IBI", 8, locality, length) + command


def vendor_set_locality(tag: int, body: bytes) -> bytes:
    return struct.pack(">HII", tag, 10 + len(body), 0x20001000) + body
