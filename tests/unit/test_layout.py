"""The declaration helper: one field list, two byte orders, nothing read beyond the bytes."""

import sys

import pytest

from vtpm_cuse.errors import WireError
from vtpm_cuse.wire.layout import (
    BIG,
    HOST,
    I32,
    U8,
    U16,
    U32,
    U64,
    ByteOrder,
    Tail,
    WireStruct,
    wire,
)


@wire()
class Mixed(WireStruct):
    """One of each."""

    a: U8
    b: U8
    c: U16
    d: U32
    e: U64
    f: I32


@wire(pad=3)
class Padded(WireStruct):
    """Ends in padding."""

    result: U32
    bit: U8


@wire(tail=8)
class Tailed(WireStruct):
    """Ends in bytes."""

    length: U32
    data: Tail


@wire()
class Empty(WireStruct):
    """No fields."""


MIXED = Mixed(1, 2, 0x0304, 0x05060708, 0x090A0B0C0D0E0F10, -2)


def test_big_endian_literal() -> None:
    assert MIXED.pack(BIG).hex() == "0102030405060708090a0b0c0d0e0f10fffffffe"


@pytest.mark.skipif(sys.byteorder == "big", reason="the literal is little-endian")
def test_host_literal() -> None:
    assert MIXED.pack(HOST).hex() == "010204030807060510" + "0f0e0d0c0b0a09feffffff"


@pytest.mark.parametrize("order", [HOST, BIG])
def test_no_hidden_alignment(order: ByteOrder) -> None:
    assert Mixed.SIZE == 20
    assert len(MIXED.pack(order)) == 20


def test_padding_is_zero_and_not_looked_at() -> None:
    assert Padded.SIZE == 8
    assert Padded(1, 2).pack(BIG).hex() == "0000000102000000"
    assert Padded.unpack_untrusted(bytes.fromhex("0000000102ffffff"), BIG) == Padded(1, 2)


def test_tail_is_what_follows() -> None:
    value = Tailed.unpack_untrusted(bytes.fromhex("00000003") + b"abcdef", BIG)
    assert value == Tailed(3, b"abcdef")
    assert value.pack(BIG) == bytes.fromhex("00000003") + b"abcdef"
    assert (Tailed.SIZE, Tailed.TAIL) == (4, 8)


def test_tail_owns_its_bytes() -> None:
    buffer = bytearray(bytes.fromhex("00000003") + b"abc")
    value = Tailed.unpack_untrusted(memoryview(buffer), BIG)
    buffer[:] = bytes(len(buffer))
    assert value.data == b"abc"


def test_too_short_says_how_much() -> None:
    with pytest.raises(WireError) as caught:
        Mixed.unpack_untrusted(bytes(19), BIG)
    assert (caught.value.what, caught.value.need, caught.value.got) == ("Mixed", 20, 19)
    assert str(caught.value) == "Mixed: 20 bytes needed, 19 there"


def test_surplus_is_left_alone() -> None:
    assert Padded.unpack_untrusted(bytes(8) + b"more", HOST) == Padded(0, 0)


def test_empty_structure() -> None:
    assert Empty.SIZE == 0
    assert Empty.unpack_untrusted(b"", HOST).pack(BIG) == b""


def test_values_are_frozen() -> None:
    with pytest.raises(AttributeError):
        MIXED.a = 2  # type: ignore[misc]
    assert not hasattr(MIXED, "__dict__")


def test_structures_do_not_share_their_layout() -> None:
    assert Padded.compiled(BIG).unpack(bytes.fromhex("0000000102000000")) == (1, 2)
    assert Mixed.compiled(BIG).unpack(MIXED.pack(BIG))[2] == 0x0304
