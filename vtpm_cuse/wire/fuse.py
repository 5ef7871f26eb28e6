"""The part of the FUSE kernel protocol that is used here; host byte order, linux/fuse.h."""

from enum import IntEnum, IntFlag
from typing import Final

from vtpm_cuse.wire.layout import I32, U16, U32, U64, Tail, WireStruct, wire

FUSE_KERNEL_VERSION: Final = 7
CUSE_INIT_INFO_MAX: Final = 4096


class FuseOpcode(IntEnum):
    """Requests; of a device's OPEN, READ, WRITE, RELEASE, INTERRUPT, IOCTL and POLL are answered."""

    FUSE_LOOKUP = 1
    FUSE_FORGET = 2
    FUSE_GETATTR = 3
    FUSE_SETATTR = 4
    FUSE_SYMLINK = 6
    FUSE_MKNOD = 8
    FUSE_MKDIR = 9
    FUSE_UNLINK = 10
    FUSE_RMDIR = 11
    FUSE_RENAME = 12
    FUSE_LINK = 13
    FUSE_OPEN = 14
    FUSE_READ = 15
    FUSE_WRITE = 16
    FUSE_STATFS = 17
    FUSE_RELEASE = 18
    FUSE_FSYNC = 20
    FUSE_FLUSH = 25
    FUSE_INIT = 26
    FUSE_OPENDIR = 27
    FUSE_READDIR = 28
    FUSE_RELEASEDIR = 29
    FUSE_CREATE = 35
    FUSE_INTERRUPT = 36
    FUSE_DESTROY = 38
    FUSE_IOCTL = 39
    FUSE_POLL = 40
    FUSE_BATCH_FORGET = 42
    FUSE_RENAME2 = 45
    CUSE_INIT = 4096


FUSE_NOTIFY_POLL: Final = 1
FUSE_NOTIFY_RESEND: Final = 7
FUSE_POLL_SCHEDULE_NOTIFY: Final = 1
FUSE_ROOT_ID: Final = 1
FUSE_ATOMIC_O_TRUNC: Final = 1 << 3
"""Flag of INIT: open(2) with O_TRUNC is one request."""


class FuseOpenFlag(IntFlag):
    """open_flags of an OPEN reply."""

    FOPEN_DIRECT_IO = 1
    FOPEN_NONSEEKABLE = 4
    FOPEN_STREAM = 16


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


@wire()
class FuseInitIn(WireStruct):
    """INIT request, as far as it is looked at."""

    major: U32
    minor: U32
    max_readahead: U32
    flags: U32


@wire(pad=36)
class FuseInitOut(WireStruct):
    """INIT reply, 64 bytes; max_write is what one WRITE may carry."""

    major: U32
    minor: U32
    max_readahead: U32
    flags: U32
    max_background: U16
    congestion_threshold: U16
    max_write: U32
    time_gran: U32


@wire()
class FuseAttr(WireStruct):
    """What stat(2) tells of a file, 88 bytes."""

    ino: U64
    size: U64
    blocks: U64
    atime: U64
    mtime: U64
    ctime: U64
    atimensec: U32
    mtimensec: U32
    ctimensec: U32
    mode: U32
    nlink: U32
    uid: U32
    gid: U32
    rdev: U32 = 0
    blksize: U32 = 4096
    flags: U32 = 0


@wire(tail=88)
class FuseEntryOut(WireStruct):
    """LOOKUP reply, 128 bytes with the attributes; the times say how long both stay true."""

    nodeid: U64
    generation: U64
    entry_valid: U64
    attr_valid: U64
    entry_valid_nsec: U32
    attr_valid_nsec: U32
    attr: Tail


@wire(tail=88)
class FuseAttrOut(WireStruct):
    """GETATTR reply, 104 bytes with the attributes."""

    attr_valid: U64
    attr_valid_nsec: U32
    dummy: U32
    attr: Tail


@wire()
class FuseOpenIn(WireStruct):
    """OPEN and OPENDIR request; flags are open(2)'s."""

    flags: U32
    open_flags: U32


@wire(tail=255)
class FuseDirent(WireStruct):
    """One entry of a READDIR reply; off is where the next one is found, type a DT_ value.

    The name follows; entries begin at multiples of 8.
    """

    ino: U64
    off: U64
    namelen: U32
    type: U32
    name: Tail


@wire(pad=28)
class FuseStatfsOut(WireStruct):
    """STATFS reply, 80 bytes."""

    blocks: U64
    bfree: U64
    bavail: U64
    files: U64
    ffree: U64
    bsize: U32
    namelen: U32
    frsize: U32
