"""FUSE structures against the sizes and offsets of linux/fuse.h, protocol 7.38."""

from dataclasses import fields

import pytest

from vtpm_cuse.wire import fuse
from vtpm_cuse.wire.layout import HOST, WireStruct

_SIZES: list[tuple[type[WireStruct], int]] = [
    (fuse.FuseInHeader, 40),
    (fuse.FuseOutHeader, 16),
    (fuse.CuseInitIn, 16),
    (fuse.CuseInitOut, 72),
    (fuse.FuseOpenOut, 16),
    (fuse.FuseReadWriteIn, 40),
    (fuse.FuseWriteOut, 8),
    (fuse.FuseIoctlIn, 32),
    (fuse.FuseIoctlOut, 16),
    (fuse.FusePollIn, 24),
    (fuse.FusePollOut, 8),
    (fuse.FuseInterruptIn, 8),
    (fuse.FusePollWakeup, 8),
]

# One field of each structure: its offset and size.
_OFFSETS: list[tuple[type[WireStruct], str, int, int]] = [
    (fuse.FuseInHeader, "opcode", 4, 4),
    (fuse.FuseInHeader, "unique", 8, 8),
    (fuse.FuseInHeader, "nodeid", 16, 8),
    (fuse.FuseInHeader, "uid", 24, 4),
    (fuse.FuseInHeader, "gid", 28, 4),
    (fuse.FuseInHeader, "pid", 32, 4),
    (fuse.FuseInHeader, "total_extlen", 36, 2),
    (fuse.FuseOutHeader, "error", 4, 4),
    (fuse.FuseOutHeader, "unique", 8, 8),
    (fuse.CuseInitIn, "minor", 4, 4),
    (fuse.CuseInitIn, "flags", 12, 4),
    (fuse.CuseInitOut, "flags", 12, 4),
    (fuse.CuseInitOut, "max_read", 16, 4),
    (fuse.CuseInitOut, "max_write", 20, 4),
    (fuse.CuseInitOut, "dev_major", 24, 4),
    (fuse.CuseInitOut, "dev_minor", 28, 4),
    (fuse.FuseOpenOut, "open_flags", 8, 4),
    (fuse.FuseReadWriteIn, "offset", 8, 8),
    (fuse.FuseReadWriteIn, "size", 16, 4),
    (fuse.FuseReadWriteIn, "transfer_flags", 20, 4),
    (fuse.FuseReadWriteIn, "lock_owner", 24, 8),
    (fuse.FuseReadWriteIn, "flags", 32, 4),
    (fuse.FuseIoctlIn, "flags", 8, 4),
    (fuse.FuseIoctlIn, "cmd", 12, 4),
    (fuse.FuseIoctlIn, "arg", 16, 8),
    (fuse.FuseIoctlIn, "in_size", 24, 4),
    (fuse.FuseIoctlIn, "out_size", 28, 4),
    (fuse.FuseIoctlOut, "flags", 4, 4),
    (fuse.FuseIoctlOut, "out_iovs", 12, 4),
    (fuse.FusePollIn, "kh", 8, 8),
    (fuse.FusePollIn, "flags", 16, 4),
    (fuse.FusePollIn, "events", 20, 4),
]


@pytest.mark.parametrize(("kind", "size"), _SIZES)
def test_size(kind: type[WireStruct], size: int) -> None:
    assert size == kind.SIZE


@pytest.mark.parametrize(("kind", "field", "offset", "size"), _OFFSETS)
def test_offset(kind: type[WireStruct], field: str, offset: int, size: int) -> None:
    """All ones in one field's place are all ones in that field, and zero in the others."""
    data = bytearray(kind.SIZE)
    data[offset : offset + size] = b"\xff" * size
    value = kind.unpack_untrusted(data, HOST)
    ones = -1 if field == "error" else (1 << 8 * size) - 1
    for name in (declared.name for declared in fields(kind)):
        expected = ones if name == field else b"" if name == "info" else 0
        assert getattr(value, name) == expected, name


def test_opcodes() -> None:
    assert {opcode.name: opcode.value for opcode in fuse.FuseOpcode} == {
        "FUSE_OPEN": 14,
        "FUSE_READ": 15,
        "FUSE_WRITE": 16,
        "FUSE_RELEASE": 18,
        "FUSE_FSYNC": 20,
        "FUSE_FLUSH": 25,
        "FUSE_INTERRUPT": 36,
        "FUSE_DESTROY": 38,
        "FUSE_IOCTL": 39,
        "FUSE_POLL": 40,
        "CUSE_INIT": 4096,
    }
