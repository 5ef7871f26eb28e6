"""``unlock.py IMAGE DEVICE``: opens a LUKS volume as systemd-cryptsetup does, but for the mapping.

libcryptsetup's program cannot tell the plug-in which TPM to use, and systemd's needs the kernel's
device mapper for the volume that it has unlocked.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Final

_ANY_TOKEN: Final = -1
_ANY_PCRS: Final = 0xFFFFFFFF


class _Parameters(ctypes.Structure):
    """systemd_tpm2_plugin_params of systemd 252."""

    _fields_ = (  # type: ignore[mutable-override]  # as ctypes wants it
        ("search_pcr_mask", ctypes.c_uint32),
        ("device", ctypes.c_char_p),
        ("signature_path", ctypes.c_char_p),
    )


def main() -> None:
    image, device = (word.encode() for word in sys.argv[1:])
    lib, context = ctypes.CDLL("libcryptsetup.so.12"), ctypes.c_void_p()
    assert lib.crypt_init(ctypes.byref(context), image) == 0
    assert lib.crypt_load(context, b"LUKS2", None) == 0
    parameters = _Parameters(_ANY_PCRS, device, None)
    nothing = (None, ctypes.c_size_t(0))
    slot = lib.crypt_activate_by_token_pin(
        *(context, None, b"systemd-tpm2", _ANY_TOKEN, *nothing, ctypes.byref(parameters), 0)
    )
    sys.exit(f"not unlocked: {slot}" if slot < 0 else 0)


if __name__ == "__main__":
    main()
