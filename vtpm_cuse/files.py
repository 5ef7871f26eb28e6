"""What a change of files takes to outlive a power cut, wherever the files are."""

from __future__ import annotations

import errno
import os
from typing import Final

_NOT_OFFERED: Final = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF}
"""What file systems answer that flush a folder by themselves, or cannot: CIFS, the shared folders
of virtual machines, some in user space. (EBADF: the descriptor was not opened for writing, as no
folder's can be.)"""


def flush_folder(fd: int) -> None:
    """Puts the names in a folder on the disk, where its file system lets a program ask for that.

    Raises:
        OSError: The disk could not take them.
    """
    try:
        os.fsync(fd)
    except OSError as exc:
        if exc.errno not in _NOT_OFFERED:
            raise
