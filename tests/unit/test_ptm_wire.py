"""The PTM table: literal ioctl numbers, literal bytes in both orders, any bytes at all."""

from __future__ import annotations

import sys
from typing import Any, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtpm_cuse.errors import WireError
from vtpm_cuse.wire import ptm
from vtpm_cuse.wire.layout import BIG, HOST, ByteOrder, WireStruct
from vtpm_cuse.wire.ptm import PTM_IOCTLS, PTM_SPECS, PtmCommand

# As the C compiler computes them from tpm_ioctl.h.
IOCTLS = {
    "PTM_GET_CAPABILITY": 0x80085000,
    "PTM_INIT": 0xC0045001,
    "PTM_SHUTDOWN": 0x80045002,
    "PTM_GET_TPMESTABLISHED": 0x80085003,
    "PTM_SET_LOCALITY": 0xC0045004,
    "PTM_HASH_START": 0x80045005,
    "PTM_HASH_DATA": 0xD0045006,
    "PTM_HASH_END": 0x80045007,
    "PTM_CANCEL_TPM_CMD": 0x80045008,
    "PTM_STORE_VOLATILE": 0x80045009,
    "PTM_RESET_TPMESTABLISHED": 0xC004500A,
    "PTM_GET_STATEBLOB": 0xCC10500B,
    "PTM_SET_STATEBLOB": 0xCC0C500C,
    "PTM_STOP": 0x8004500D,
    "PTM_GET_CONFIG": 0x8008500E,
    "PTM_SET_DATAFD": 0x8004500F,
    "PTM_SET_BUFFERSIZE": 0xC0105010,
    "PTM_GET_INFO": 0xCC105011,
    "PTM_LOCK_STORAGE": 0xC0045012,
    # Ours.
    "PTM_GET_CLIENTS": 0xCC0C5040,
    "PTM_FLUSH_CLIENT": 0xC0085041,
}

# Structure, big-endian bytes, little-endian bytes.
VECTORS: list[tuple[WireStruct, str, str]] = [
    (ptm.PtmEmpty(), "", ""),
    (ptm.PtmResultResponse(0x800), "00000800", "00080000"),
    (ptm.PtmCapabilityIoctl(0x1FFFF), "000000000001ffff", "ffff010000000000"),
    (ptm.PtmCapabilityControl(0, 0x1FFFF), "000000000001ffff", "00000000ffff0100"),
    (ptm.PtmInitRequest(1), "00000001", "01000000"),
    (ptm.PtmEstablishedResponse(0xA, 1), "0000000a01000000", "0a00000001000000"),
    (ptm.PtmLocalityRequest(3), "03000000", "03000000"),
    (ptm.PtmHashDataRequest(2, b"ab"), "000000026162", "020000006162"),
    (ptm.PtmGetStateRequest(1, 2, 0x0C00), "000000010000000200000c00", "0100000002000000000c0000"),
    (
        ptm.PtmGetStateResponse(0, 2, 0x0D00, 3, b"abc"),
        "000000000000000200000d0000000003616263",
        "0000000002000000000d000003000000616263",
    ),
    (
        ptm.PtmSetStateRequest(2, 1, 1, b"a"),
        "00000002000000010000000161",
        "02000000010000000100000061",
    ),
    (ptm.PtmConfigResponse(0, 3), "0000000000000003", "0000000003000000"),
    (ptm.PtmBufferSizeRequest(0xAF8), "00000af8", "f80a0000"),
    (
        ptm.PtmBufferSizeResponse(0, 4096, 2808, 4096),
        "000000000000100000000af800001000",
        "0000000000100000f80a000000100000",
    ),
    (ptm.PtmClientsRequest(0xC00), "00000c00", "000c0000"),
    (ptm.PtmFlushClientRequest(7, 0x80000001), "0000000780000001", "0700000001000080"),
    (
        ptm.PtmInfoRequest(0x100000002, 0xC00),
        "000000010000000200000c0000000000",
        "0200000001000000000c000000000000",
    ),
    (
        ptm.PtmInfoResponse(0, 3, 3, b"{}\0"),
        "0000000000000003000000037b7d00",
        "0000000003000000030000007b7d00",
    ),
    (ptm.PtmLockStorageRequest(300), "0000012c", "2c010000"),
]
STRUCTS = sorted({type(struct) for struct, _, _ in VECTORS}, key=lambda kind: kind.__name__)

little_endian = pytest.mark.skipif(sys.byteorder == "big", reason="little-endian literals")


@pytest.mark.parametrize("command", PtmCommand)
def test_ioctl_numbers(command: PtmCommand) -> None:
    assert PTM_SPECS[command].ioctl(command) == IOCTLS[command.name]
    assert PTM_IOCTLS[IOCTLS[command.name]] is command


def test_every_command_is_in_the_table() -> None:
    assert len(PtmCommand) == len(PTM_SPECS) == len(PTM_IOCTLS) == len(IOCTLS) == 21


def test_every_structure_has_a_vector() -> None:
    declared = {
        kind
        for kind in vars(ptm).values()
        if isinstance(kind, type) and issubclass(kind, WireStruct) and kind is not WireStruct
    }
    assert declared == set(STRUCTS)


@pytest.mark.parametrize(("struct", "big", "_little"), VECTORS)
def test_control_channel_bytes(struct: WireStruct, big: str, _little: str) -> None:
    assert struct.pack(BIG).hex() == big
    assert type(struct).unpack_untrusted(bytes.fromhex(big), BIG) == struct


@little_endian
@pytest.mark.parametrize(("struct", "_big", "little"), VECTORS)
def test_ioctl_bytes(struct: WireStruct, _big: str, little: str) -> None:
    assert struct.pack(HOST).hex() == little
    assert type(struct).unpack_untrusted(bytes.fromhex(little), HOST) == struct


def test_capability_of_the_control_channel_reads_as_one_mask() -> None:
    answer = ptm.PtmCapabilityControl(0, 0x1FFFF).pack(BIG)
    assert ptm.PtmCapabilityIoctl.unpack_untrusted(answer, BIG).caps == 0x1FFFF


@given(st.sampled_from(STRUCTS), st.binary(max_size=64), st.sampled_from([BIG, HOST]))
def test_any_bytes_are_a_structure_or_an_error(
    kind: type[WireStruct], data: bytes, order: ByteOrder
) -> None:
    if len(data) < kind.SIZE:
        with pytest.raises(WireError) as info:
            kind.unpack_untrusted(data, order)
        assert (info.value.need, info.value.got) == (kind.SIZE, len(data))
        return
    value = kind.unpack_untrusted(data, order)
    packed = value.pack(order)
    assert kind.unpack_untrusted(packed, order) == value


@given(st.data())
def test_round_trip(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(STRUCTS))
    limits = {"B": 0xFF, "I": 0xFFFFFFFF, "Q": (1 << 64) - 1}
    values: dict[str, Any] = {
        name: data.draw(st.binary(max_size=20) if code == "" else st.integers(0, limits[code]))
        for name, hint in get_type_hints(kind, include_extras=True).items()
        for code in getattr(hint, "__metadata__", ())
    }
    value = kind(**values)
    for order in (BIG, HOST):
        assert kind.unpack_untrusted(value.pack(order), order) == value
