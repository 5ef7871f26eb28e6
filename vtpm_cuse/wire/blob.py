"""State blobs as the C suite writes them to files and hands them over in migrations.

A blob is a 10-byte header, then TLV elements (version 2) or the bare payload
(version 1). All integers are big-endian. Checks that fail raise BlobError with
the C suite's result code.
"""

from enum import IntEnum, IntFlag
from typing import Final

from vtpm_cuse.errors import BlobError
from vtpm_cuse.wire.layout import BIG, U8, U16, U32, WireStruct, wire
from vtpm_cuse.wire.ptm import PtmResult

BLOB_VERSION: Final = 2
BLOB_SIZE_MAX: Final = 1 << 20
"""Bytes; a hundred times what a full TPM needs, and a bound for hostile files."""


class BlobFlag(IntFlag):
    """Flags of the blob header."""

    ENCRYPTED = 0x1
    MIGRATION_ENCRYPTED = 0x2
    MIGRATION_DATA = 0x4
    KEY_256BIT = 0x8
    MIGRATION_KEY_256BIT = 0x10


class BlobTag(IntEnum):
    """Tags of the TLV elements."""

    DATA = 1
    ENCRYPTED_DATA = 2
    HMAC = 3
    MIGRATION_DATA = 4
    ENCRYPTED_MIGRATION_DATA = 5
    IV_DATA = 6
    IV_MIGRATION_DATA = 7


_PAYLOAD_BEGINNINGS: Final[dict[str, tuple[tuple[int, bytes], ...]]] = {
    "permall": ((2, b"\xab\x36\x47\x23"), (0, b"\x00\x01\x00\x22")),
    "volatilestate": ((2, b"\x45\x63\x78\x89"), (0, b"\x00\x01\x00\x01")),
    "savestate": ((0, b"\x00\x24"),),
}
"""Offset and bytes by which libtpms' states are known, of a TPM 2.0 and of a 1.2."""


def is_payload(name: str, payload: bytes) -> bool:
    """Whether *payload* begins as a state of that name does."""
    return any(payload.startswith(mark, at) for at, mark in _PAYLOAD_BEGINNINGS[name])


INCOMING_BLOB_MAX: Final = 512 << 10
"""Bytes of a blob that a client may set, as in the C suite's 0.11."""


@wire()
class BlobHeader(WireStruct):
    """The header, 10 bytes; total_size counts header and everything after it."""

    version: U8
    min_version: U8
    header_size: U16
    flags: U16
    total_size: U32


@wire()
class TlvHeader(WireStruct):
    """Head of one element, 6 bytes; length counts the value alone."""

    tag: U16
    length: U32


def tlv(tag: BlobTag, value: bytes) -> bytes:
    """One element."""
    return TlvHeader(tag, len(value)).pack(BIG) + value


def find_tlv_untrusted(stream: bytes, tag: BlobTag) -> bytes | None:
    """The value of the first element with *tag*; None when there is none or one overruns the end."""
    offset = 0
    while offset + TlvHeader.SIZE <= len(stream):
        head = TlvHeader.unpack_untrusted(memoryview(stream)[offset:], BIG)
        start = offset + TlvHeader.SIZE
        if head.length > len(stream) - start:
            return None
        if head.tag == tag:
            return stream[start : start + head.length]
        offset = start + head.length
    return None


def with_header(flags: BlobFlag, body: bytes) -> bytes:
    """A version 2 blob around *body*."""
    total = BlobHeader.SIZE + len(body)
    return BlobHeader(BLOB_VERSION, 1, BlobHeader.SIZE, flags, total).pack(BIG) + body


def split_header_untrusted(blob: bytes) -> tuple[BlobHeader, bytes]:
    """Checks the header; returns it and the body. Raises BlobError."""
    if len(blob) < BlobHeader.SIZE:
        raise BlobError(
            PtmResult.TPM_BAD_PARAMETER, f"not enough bytes for the blob header: {len(blob)}"
        )
    header = BlobHeader.unpack_untrusted(blob, BIG)
    if header.total_size != len(blob):
        raise BlobError(
            PtmResult.TPM_BAD_PARAMETER,
            f"blob header says {header.total_size} bytes, {len(blob)} are there",
        )
    if header.min_version > BLOB_VERSION:
        raise BlobError(
            PtmResult.TPM_BAD_VERSION,
            f"blob needs format version {header.min_version}, only {BLOB_VERSION} is understood",
        )
    if header.header_size != BlobHeader.SIZE:
        raise BlobError(
            PtmResult.TPM_BAD_DATASIZE,
            f"blob header size is {header.header_size} instead of {BlobHeader.SIZE}",
        )
    if header.version not in {1, BLOB_VERSION}:
        raise BlobError(PtmResult.TPM_FAIL, f"blob has unknown format version {header.version}")
    return header, blob[BlobHeader.SIZE :]
