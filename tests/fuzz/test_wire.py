"""Any bytes are a value or a typed error, and values come back in both byte orders."""

from __future__ import annotations

import contextlib
import struct
from inspect import get_annotations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtpm_cuse.errors import BlobError, StateDamaged, WireError
from vtpm_cuse.storage.memory import MemoryStore
from vtpm_cuse.storage.sealed import SealedStore
from vtpm_cuse.wire import blob, fuse, linear, ptm, tpm
from vtpm_cuse.wire.layout import BIG, HOST, WireStruct

STRUCTURES: list[type[WireStruct]] = [
    value
    for module in (blob, fuse, linear, ptm, tpm)
    for value in vars(module).values()
    if isinstance(value, type) and issubclass(value, WireStruct) and value is not WireStruct
]
_BITS = {"B": 8, "H": 16, "I": 32, "Q": 64}


def values_of(kind: type[WireStruct]) -> st.SearchStrategy[WireStruct]:
    strategies: dict[str, Any] = {}
    for name, hint in get_annotations(kind).items():
        code = hint.__metadata__[0]
        if not code:
            strategies[name] = st.binary(max_size=kind.TAIL)
        elif code == "i":
            strategies[name] = st.integers(-(1 << 31), (1 << 31) - 1)
        else:
            strategies[name] = st.integers(0, (1 << _BITS[code]) - 1)
    return st.builds(kind, **strategies)


@pytest.mark.parametrize("kind", STRUCTURES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("order", [BIG, HOST])
def test_any_bytes(kind: type[WireStruct], order: Any) -> None:  # noqa: ANN401
    @given(st.binary(max_size=kind.SIZE + 20))
    def check(data: bytes) -> None:
        if len(data) < kind.SIZE:
            with pytest.raises(WireError) as caught:
                kind.unpack_untrusted(data, order)
            assert (caught.value.need, caught.value.got) == (kind.SIZE, len(data))
            return
        value = kind.unpack_untrusted(data, order)
        again = value.pack(order)
        assert kind.unpack_untrusted(again, order) == value

    check()


@pytest.mark.parametrize("kind", STRUCTURES, ids=lambda kind: kind.__name__)
def test_round_trip(kind: type[WireStruct]) -> None:
    @given(values_of(kind))
    def check(value: WireStruct) -> None:
        for order in (BIG, HOST):
            data = value.pack(order)
            assert kind.unpack_untrusted(data, order) == value
            assert kind.unpack_untrusted(memoryview(bytearray(data)), order) == value

    check()


@given(st.binary(max_size=200))
def test_any_blob(data: bytes) -> None:
    with contextlib.suppress(BlobError):
        header, body = blob.split_header_untrusted(data)
        assert header.total_size == len(data) == len(body) + 10


@given(st.binary(max_size=200), st.sampled_from(list(blob.BlobTag)))
def test_any_stream(data: bytes, tag: blob.BlobTag) -> None:
    value = blob.find_tlv_untrusted(data, tag)
    assert value is None or value in data


@given(st.binary(max_size=300))
def test_any_state_file(data: bytes) -> None:
    store = MemoryStore()
    store.blobs["permall"] = data
    with contextlib.suppress(StateDamaged):
        assert SealedStore(store).load("permall") in data


@given(st.binary(max_size=60), st.integers(0, 0xFFFF), st.integers(0, 3))
def test_any_migration_blob(body: bytes, header_flags: int, flags: int) -> None:
    data = bytes.fromhex("0201000a") + header_flags.to_bytes(2, "big")
    data += (10 + len(body)).to_bytes(4, "big") + body
    with contextlib.suppress(BlobError):
        payload = SealedStore(MemoryStore()).from_migration_untrusted("permall", data, flags)
        assert payload in data


@given(st.binary(max_size=5000))
def test_payload_round_trip(payload: bytes) -> None:
    store = SealedStore(MemoryStore())
    store.store("permall", payload)
    assert store.load("permall") == payload
    _, migration = store.to_migration(payload, decrypted=False)
    if payload:
        assert store.from_migration_untrusted("permall", migration, 0) == payload


@given(st.binary(max_size=30))
def test_command_code_and_response_code(data: bytes) -> None:
    assert tpm.command_code(data) == data[6:10]
    with contextlib.suppress(WireError):
        assert tpm.response_code(data) == int.from_bytes(data[6:10], "big")


U32 = st.one_of(
    st.integers(0, 9000), st.sampled_from([191, 192, 193, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
)


@given(st.lists(st.tuples(U32, U32, U32), max_size=15), st.integers(0, 20_000))
def test_any_linear_table(slots: list[tuple[int, int, int]], size: int) -> None:
    """A table is refused, or all of its sections are in the file and apart from each other."""
    header = linear.pack_header(linear.EMPTY_TABLE)[:12]
    header += b"".join(struct.pack("<III", *slot) for slot in slots).ljust(180, b"\0")
    try:
        table = linear.unpack_header_untrusted(header, size)
    except BlobError:
        return
    covered = [192]
    for section in sorted(table, key=lambda one: one.offset):
        if section.used:
            assert covered[-1] <= section.offset
            assert section.data_length <= section.section_length
            covered.append(section.end)
    assert covered[-1] <= max(size, 192)


@given(st.binary(max_size=400), st.integers(0, 1 << 33))
def test_any_linear_header(data: bytes, size: int) -> None:
    with contextlib.suppress(BlobError):
        linear.unpack_header_untrusted(data, size)
        assert data[:8] == linear.pack_header(linear.EMPTY_TABLE)[:8]


@given(
    st.lists(
        st.dictionaries(st.integers(0, 2), st.one_of(st.none(), st.integers(0, 9000)), min_size=1),
        max_size=30,
    ),
    st.integers(192, 300_000),
)
def test_linear_tables_from_any_changes(changes: list[dict[int, int | None]], limit: int) -> None:
    """Whatever is written, a new section touches no section of the table before."""
    table = linear.EMPTY_TABLE
    for change in changes:
        new = linear.with_changes(table, change, limit)
        if new is None:
            continue
        assert linear.unpack_header_untrusted(linear.pack_header(new), limit) == new
        for slot, length in change.items():
            section = new[slot]
            assert section.used == (length is not None)
            if length is not None:
                assert section.data_length == length
                assert all(
                    section.end <= old.offset or old.end <= section.offset
                    for old in table
                    if old.used
                )
        table = new
