"""FUSE structures against the sizes and offsets of linux/fuse.h, protocol 7.38."""

from inspect import get_annotations

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
    (fuse.FuseInitIn, 16),
    (fuse.FuseInitOut, 64),
    (fuse.FuseAttr, 88),
    (fuse.FuseEntryOut, 40),  # and the attributes
    (fuse.FuseAttrOut, 16),  # and the attributes
    (fuse.FuseOpenIn, 8),
    (fuse.FuseDirent, 24),  # and the name
    (fuse.FuseStatfsOut, 80),
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
    (fuse.FuseInitIn, "max_readahead", 8, 4),
    (fuse.FuseInitIn, "flags", 12, 4),
    (fuse.FuseInitOut, "flags", 12, 4),
    (fuse.FuseInitOut, "congestion_threshold", 18, 2),
    (fuse.FuseInitOut, "max_write", 20, 4),
    (fuse.FuseInitOut, "time_gran", 24, 4),
    (fuse.FuseAttr, "size", 8, 8),
    (fuse.FuseAttr, "mtime", 32, 8),
    (fuse.FuseAttr, "mode", 60, 4),
    (fuse.FuseAttr, "nlink", 64, 4),
    (fuse.FuseAttr, "uid", 68, 4),
    (fuse.FuseAttr, "gid", 72, 4),
    (fuse.FuseAttr, "blksize", 80, 4),
    (fuse.FuseEntryOut, "entry_valid", 16, 8),
    (fuse.FuseEntryOut, "attr_valid_nsec", 36, 4),
    (fuse.FuseOpenIn, "flags", 0, 4),
    (fuse.FuseDirent, "off", 8, 8),
    (fuse.FuseDirent, "namelen", 16, 4),
    (fuse.FuseDirent, "type", 20, 4),
    (fuse.FuseStatfsOut, "bsize", 40, 4),
    (fuse.FuseStatfsOut, "namelen", 44, 4),
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
    for name in get_annotations(kind):
        expected = ones if name == field else b"" if name in {"info", "attr", "name"} else 0
        assert getattr(value, name) == expected, name


def test_opcodes() -> None:
    assert {opcode.name: opcode.value for opcode in fuse.FuseOpcode} == {
        "FUSE_LOOKUP": 1,
        "FUSE_FORGET": 2,
        "FUSE_GETATTR": 3,
        "FUSE_SETATTR": 4,
        "FUSE_SYMLINK": 6,
        "FUSE_MKNOD": 8,
        "FUSE_MKDIR": 9,
        "FUSE_UNLINK": 10,
        "FUSE_RMDIR": 11,
        "FUSE_RENAME": 12,
        "FUSE_LINK": 13,
        "FUSE_OPEN": 14,
        "FUSE_READ": 15,
        "FUSE_WRITE": 16,
        "FUSE_STATFS": 17,
        "FUSE_RELEASE": 18,
        "FUSE_FSYNC": 20,
        "FUSE_FLUSH": 25,
        "FUSE_INIT": 26,
        "FUSE_OPENDIR": 27,
        "FUSE_READDIR": 28,
        "FUSE_RELEASEDIR": 29,
        "FUSE_CREATE": 35,
        "FUSE_INTERRUPT": 36,
        "FUSE_DESTROY": 38,
        "FUSE_IOCTL": 39,
        "FUSE_POLL": 40,
        "FUSE_BATCH_FORGET": 42,
        "FUSE_RENAME2": 45,
        "CUSE_INIT": 4096,
    }
