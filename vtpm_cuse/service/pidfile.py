"""``--pid``: the process id as decimal digits, without a newline, as scripts expect it."""

from __future__ import annotations

import contextlib
import os
import stat
from typing import TYPE_CHECKING

from vtpm_cuse.errors import UsageError
from vtpm_cuse.files import open_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vtpm_cuse.service.config import PidConfig


class PidFile:
    """The file to come; `open` may need privileges that `write` has no more.

    Args:
        config: Where; None for nowhere.
        exit_status: Of a process that cannot write it.
    """

    def __init__(self, config: PidConfig | None, exit_status: int) -> None:
        self._exit_status = exit_status
        self._path = config.path if config else None
        self._fd = -1 if config is None or config.fd is None else config.fd
        self.paths = _path_of(self._fd) if self._path is None else [os.path.abspath(self._path)]
        """What is removed at the end."""

    def open(self, owner: tuple[int, int] | None) -> None:
        """Makes the file, for *owner*; what another process wrote stays. Raises UsageError."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW
        if self._path is not None:
            with self._errors():
                self._fd = open_for(self._path, flags, 0o644, owner)

    def write(self, pid: int) -> None:
        """Puts a process id into the file that is open. Raises UsageError."""
        if self._fd >= 0:
            with self._errors():
                if stat.S_ISREG(os.fstat(self._fd).st_mode):
                    os.ftruncate(self._fd, 0)
                os.write(self._fd, b"%d" % pid)
        if self._path is not None:
            os.close(self._fd)

    def remove(self) -> None:
        """Removes the file, if it is one."""
        for path in self.paths:
            with contextlib.suppress(OSError):
                if stat.S_ISREG(os.lstat(path).st_mode):
                    os.unlink(path)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            target = self._fd if self._path is None else self._path
            reason = f"Could not write pid file {target}: {exc.strerror}"
            raise UsageError(reason, self._exit_status) from exc


def _path_of(fd: int) -> list[str]:
    if fd < 0:
        return []
    try:
        return [os.readlink(f"/proc/self/fd/{fd}")]
    except OSError:  # no /proc below this root
        return []
