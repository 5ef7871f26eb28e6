"""The ioctl of /dev/vtpmx against linux/vtpm_proxy.h, whose numbers are written out here."""

from __future__ import annotations

import struct

from vtpm_cuse.wire.layout import HOST
from vtpm_cuse.wire.vtpmx import VTPM_PROXY_IOC_NEW_DEV, VtpmProxyNewDev


def test_number_and_layout() -> None:
    assert VTPM_PROXY_IOC_NEW_DEV == 0xC014A100
    answer = struct.pack("=5I", 1, 2, 3, 10, 224)
    made = VtpmProxyNewDev(flags=1, tpm_num=2, fd=3, major=10, minor=224)
    assert VtpmProxyNewDev.unpack_untrusted(answer, HOST) == made
    assert made.pack(HOST) == answer
