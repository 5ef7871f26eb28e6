"""Keys from the kernel's keyrings, by libkeyutils: system call numbers differ between machines."""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Final

from vtpm_cuse.errors import UsageError

_TYPE: Final = b"user"


def read_user_key(description: str, limit: int) -> bytes:
    """The payload of a key of type "user", searched for as keyrings(7) says.

    Args:
        description: The key's, as given to ``keyctl add user DESCRIPTION``.
        limit: Bytes that a payload may have.

    Raises:
        UsageError: There is no such key, it may not be read, or it is too long.
    """
    try:
        library = ctypes.CDLL("libkeyutils.so.1", use_errno=True)
    except OSError as exc:
        raise UsageError(
            f"Could not load libkeyutils: {exc}", hint="install it (Debian: libkeyutils1)"
        ) from exc
    name = os.fsencode(description)
    if b"\0" in name:
        raise UsageError("A key's description has no NUL character")
    serial = library.request_key(_TYPE, name, None, 0)
    if serial == -1:
        raise _refused(description)
    buffer = ctypes.create_string_buffer(limit + 1)
    try:
        # The size of the whole payload comes back, however much of it fits.
        size = library.keyctl_read(serial, buffer, ctypes.c_size_t(len(buffer)))
        if size == -1:
            raise _refused(description)
        if size > limit:
            raise UsageError(f"The key '{description}' is longer than {limit} bytes")
        return ctypes.string_at(buffer, size)
    finally:
        ctypes.memset(buffer, 0, len(buffer))


def _refused(description: str) -> UsageError:
    number = ctypes.get_errno()
    hint = ""
    if number == errno.ENOKEY:
        hint = f"add it to a keyring of this process: keyctl padd user '{description}' @s < key"
    reason = f"Unable to read the key '{description}' of the kernel's keyrings"
    return UsageError(f"{reason}: {os.strerror(number)}", hint=hint)
