"""How a CUSE device comes to be: the answer to CUSE_INIT. Source: linux/fuse.h.

By hand: pyfuse3 knows no CUSE.
"""

from __future__ import annotations

from vtpm_cuse.proto.device import MAX_TRANSFER, read_init, reply_to
from vtpm_cuse.wire.fuse import (
    FUSE_KERNEL_VERSION,
    CuseInitIn,
    CuseInitOut,
    FuseOpcode,
)
from vtpm_cuse.wire.layout import HOST


def init_reply(message: memoryview, name: str, major: int, minor: int) -> bytes:
    """Answers CUSE_INIT: the device's name and number (major 0: the kernel chooses).

    Raises:
        FrontendError: The request is no CUSE_INIT that can be answered.
    """
    unique, request = read_init(message, CuseInitIn, FuseOpcode.CUSE_INIT, "/dev/cuse")
    info = f"DEVNAME={name}\0".encode()
    answer = CuseInitOut(
        FUSE_KERNEL_VERSION,
        request.minor,
        unused=0,
        flags=0,  # restricted ioctl mode: the PTM numbers carry their sizes
        max_read=MAX_TRANSFER,
        max_write=MAX_TRANSFER,
        dev_major=major,
        dev_minor=minor,
        info=info,
    )
    return reply_to(unique, answer.pack(HOST))
