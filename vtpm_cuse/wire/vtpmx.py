"""/dev/vtpmx: the ioctl that makes a TPM device of the kernel's, served through a descriptor.

Source: linux/vtpm_proxy.h. Host byte order.
"""

from typing import Final

from vtpm_cuse.wire.layout import U32, WireStruct, wire

VTPM_PROXY_FLAG_TPM2: Final = 1
"""The device is a TPM 2.0, otherwise a TPM 1.2."""


@wire()
class VtpmProxyNewDev(WireStruct):
    """struct vtpm_proxy_new_dev, 20 bytes: *flags* goes in, the rest comes back.

    The device is /dev/tpm*tpm_num*, with *major* and *minor*; *fd* serves it.
    """

    flags: U32
    tpm_num: U32
    fd: U32
    major: U32
    minor: U32


_READ_WRITE: Final = 3
_NEW_DEV: Final = 0xA1 << 8
VTPM_PROXY_IOC_NEW_DEV: Final = _READ_WRITE << 30 | VtpmProxyNewDev.SIZE << 16 | _NEW_DEV
