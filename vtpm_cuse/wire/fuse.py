"""The part of the FUSE kernel protocol that CUSE uses; host byte order, linux/fuse.h."""

from enum import IntEnum, IntFlag
from typing import Final

from vtpm_cuse.wire.layout import I32, U16, U32, U64, Tail, WireStruct, wire

FUSE_KERNEL_VERSION: Final = 7
CUSE_INIT_INFO_MAX: Final = 4096


class FuseOpcode(IntEnum):
    """Requests a character device can receive."""

    FUSE_OPEN = 14
    FUSE_READ = 15
    FUSE_WRITE = 16
    FUSE_RELEASE = 18
    FUSE_FSYNC = 20
    FUSE_FLUSH = 25
    FUSE_INTERRUPT = 36
    FUSE_DESTROY = 38
    FUSE_IOCTL = 39
    FUSE_POLL = 40
    CUSE_INIT = 4096


FUSE_NOTIFY_POLL: Final = 1
FUSE_POLL_SCHEDULE_NOTIFY: Final = 1


class FuseOpenFlag(IntFlag):
    """open_flags of an OPEN reply."""

    FOPEN_DIRECT_IO = 1
    FOPEN_NONSEEKABLE = 4


@wire()
class FuseInHeader(WireStruct):
    """Head of every request, 40 bytes."""

    len: U32
    opcode: U32
    unique: U64
    nodeid: U64
    uid: U32
    gid: U32
    pid: U32
    total_extlen: U16
    padding: U16 = 0


@wire()
class FuseOutHeader(WireStruct):
    """Head of every reply, 16 bytes; error is 0 or a negative errno."""

    len: U32
    error: I32
    unique: U64


@wire()
class CuseInitIn(WireStruct):
    """CUSE_INIT request."""

    major: U32
    minor: U32
    unused: U32
    flags: U32


@wire(pad=40, tail=CUSE_INIT_INFO_MAX)
class CuseInitOut(WireStruct):
    """CUSE_INIT reply, 72 bytes, then the device information: NUL-terminated KEY=VALUE strings."""

    major: U32
    minor: U32
    unused: U32
    flags: U32
    max_read: U32
    max_write: U32
    dev_major: U32
    dev_minor: U32
    info: Tail


@wire()
class FuseOpenOut(WireStruct):
    """OPEN reply."""

    fh: U64
    open_flags: U32
    padding: U32 = 0


@wire()
class FuseReadWriteIn(WireStruct):
    """READ and WRITE request, 40 bytes; a WRITE's data follows. flags are open(2)'s."""

    fh: U64
    offset: U64
    size: U32
    transfer_flags: U32
    lock_owner: U64
    flags: U32
    padding: U32 = 0


@wire()
class FuseWriteOut(WireStruct):
    """WRITE reply."""

    size: U32
    padding: U32 = 0


@wire()
class FuseIoctlIn(WireStruct):
    """IOCTL request; in_size bytes of argument follow."""

    fh: U64
    flags: U32
    cmd: U32
    arg: U64
    in_size: U32
    out_size: U32


@wire()
class FuseIoctlOut(WireStruct):
    """IOCTL reply; the argument to give back follows, out_size bytes at most."""

    result: I32
    flags: U32
    in_iovs: U32
    out_iovs: U32


@wire()
class FusePollIn(WireStruct):
    """POLL request; kh names the waiter in a later notification."""

    fh: U64
    kh: U64
    flags: U32
    events: U32


@wire()
class FusePollOut(WireStruct):
    """POLL reply."""

    revents: U32
    padding: U32 = 0


@wire()
class FuseInterruptIn(WireStruct):
    """INTERRUPT request: whose."""

    unique: U64


@wire()
class FusePollWakeup(WireStruct):
    """FUSE_NOTIFY_POLL, sent to the kernel behind an out header with unique 0."""

    kh: U64
