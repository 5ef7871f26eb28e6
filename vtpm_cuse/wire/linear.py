"""The linear file: all blobs of a TPM in one file or on one block device.

Little-endian: a header of 192 bytes (magic, version, a table of 15 slots), then
the sections that the slots name, in any order. The header lies within the first
sector, which a disk writes whole: to replace a blob is to write the new one where
nothing is, and then the header.

Sections of the C suite follow each other; ours begin at multiples of 4096, so that
a write which is cut off cannot reach the neighbours.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from vtpm_cuse.errors import BlobError
from vtpm_cuse.wire.blob import BLOB_SIZE_MAX
from vtpm_cuse.wire.layout import LITTLE, U8, U16, U32, U64, WireStruct, wire
from vtpm_cuse.wire.ptm import PtmResult

LINEAR_MAGIC: Final = 0x737774706D6C696E
LINEAR_VERSION: Final = 1
LINEAR_HEADER_SIZE: Final = 192
LINEAR_SLOTS: Final = 15
LINEAR_END_MAX: Final = 0xFFFF_FFFF

_ALIGNMENT: Final = 4096
_SMALL: Final = 128 << 10
"""Bytes below which a device is packed tightly instead."""


@wire()
class LinearHead(WireStruct):
    """What the header begins with, 12 bytes."""

    magic: U64
    version: U8
    padding: U8
    header_size: U16


@wire()
class LinearSection(WireStruct):
    """A slot, 12 bytes: where a blob is. The bytes behind its data mean nothing."""

    offset: U32
    data_length: U32
    section_length: U32

    @property
    def used(self) -> bool:
        """Whether there is a blob."""
        return self.offset != 0

    @property
    def end(self) -> int:
        """The first offset behind the section."""
        return self.offset + self.section_length


Table = tuple[LinearSection, ...]

_UNUSED: Final = LinearSection(0, 0, 0)
EMPTY_TABLE: Final[Table] = (_UNUSED,) * LINEAR_SLOTS
_HEAD: Final = LinearHead(LINEAR_MAGIC, LINEAR_VERSION, 0, LINEAR_HEADER_SIZE).pack(LITTLE)


def pack_header(table: Table) -> bytes:
    """All 192 bytes."""
    pack = LinearSection.compiled(LITTLE).pack
    return _HEAD + b"".join(
        [pack(one.offset, one.data_length, one.section_length) for one in table]
    )


def is_emptied(header: bytes) -> bool:
    """Whether this is what swtpm_setup leaves of a store that it empties: no magic number."""
    return header[:8] == bytes(8) and header[8:12] == _HEAD[8:]


def unpack_header_untrusted(header: bytes, size: int) -> Table:
    """Checks every offset and length against *size*, the bytes of the whole file, before use.

    Raises:
        BlobError: TPM_FAIL; the reason says which check failed.
    """
    if len(header) < LINEAR_HEADER_SIZE:
        raise _failure(f"has {len(header)} bytes of a header of {LINEAR_HEADER_SIZE}")
    head = LinearHead.unpack_untrusted(header, LITTLE)
    if head.magic != LINEAR_MAGIC:
        raise _failure("is not a linear TPM store, and not empty either: the magic number is wrong")
    if head.version > LINEAR_VERSION:
        raise _failure(f"Unknown format version: {head.version}")
    if head.header_size != LINEAR_HEADER_SIZE:
        raise _failure(f"header size is {head.header_size} instead of {LINEAR_HEADER_SIZE}")
    start = LinearHead.SIZE
    table = tuple(
        LinearSection.unpack_untrusted(header[at : at + LinearSection.SIZE], LITTLE)
        for at in range(start, LINEAR_HEADER_SIZE, LinearSection.SIZE)
    )
    _check_sections(table, size)
    return table


def _check_sections(table: Table, size: int) -> None:
    end, last = LINEAR_HEADER_SIZE, "the header"
    for section in _used(table):
        name = f"the section at {section.offset}"
        if section.offset < end:
            raise _failure(f"{name} overlaps {last}")
        if section.end > size:
            raise _failure(f"{name} ends at {section.end}, behind the end at {size}")
        if section.data_length > section.section_length:
            raise _failure(f"{name} has {section.data_length} bytes of data in too little room")
        if section.data_length > BLOB_SIZE_MAX:
            raise _failure(f"{name} has {section.data_length} bytes, more than any TPM state")
        end, last = section.end, name


def with_changes(table: Table, lengths: Mapping[int, int | None], limit: int) -> Table | None:
    """The table after some blobs were replaced or removed, their new sections where nothing is.

    Args:
        table: The present table; none of its sections is given to another blob.
        lengths: Slot to the bytes of its new blob, None for no blob.
        limit: The end of the last section that is possible.

    Returns:
        The new table; None when there is no room.
    """
    changed = list(table)
    for slot, length in lengths.items():
        changed[slot] = _UNUSED
        if length is not None:
            section = _placed([*table, *changed], length, min(limit, LINEAR_END_MAX))
            if section is None:
                return None
            changed[slot] = section
    return tuple(changed)


def _placed(taken: Iterable[LinearSection], length: int, limit: int) -> LinearSection | None:
    # A power of two, as the C suite has it, lets the C suite write the next blob in place.
    ways = [(_ALIGNMENT, 1 << max(length - 1, 0).bit_length()), (1, max(length, 1))]
    gaps = list(_gaps(taken, limit))
    for alignment, room in ways[limit < _SMALL :]:
        for start, end in gaps:
            offset = -(-start // alignment) * alignment
            if offset + room <= end:
                return LinearSection(offset, length, room)
    return None


def _gaps(taken: Iterable[LinearSection], limit: int) -> Iterator[tuple[int, int]]:
    start = LINEAR_HEADER_SIZE
    for section in _used(taken):
        yield start, section.offset
        start = max(start, section.end)
    yield start, limit


def _used(sections: Iterable[LinearSection]) -> list[LinearSection]:
    return sorted((one for one in sections if one.used), key=lambda one: one.offset)


def _failure(reason: str) -> BlobError:
    return BlobError(PtmResult.TPM_FAIL, reason)
