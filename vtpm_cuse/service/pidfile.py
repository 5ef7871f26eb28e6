"""``--pid``: the process id as decimal digits, without a newline, as scripts expect it."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from vtpm_cuse.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vtpm_cuse.service.config import PidConfig


@contextlib.contextmanager
def pid_file(config: PidConfig | None, exit_status: int) -> Iterator[None]:
    """Writes the file, and removes it at the end.

    Raises:
        UsageError: It cannot be written; with this *exit_status*.
    """
    if config is None:
        yield
        return
    target = config.fd if config.path is None else config.path
    try:
        path = _write_fd(target) if isinstance(target, int) else _write(str(target))
    except OSError as exc:
        reason = f"Could not write pid file {target}: {exc.strerror}"
        raise UsageError(reason, exit_status) from exc
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)


def _write(path: str) -> str:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(path, flags, 0o644)
    try:
        os.write(fd, b"%d" % os.getpid())
    finally:
        os.close(fd)
    return os.path.abspath(path)


def _write_fd(fd: int) -> str:
    os.ftruncate(fd, 0)
    os.write(fd, b"%d" % os.getpid())
    return os.readlink(f"/proc/self/fd/{fd}")
