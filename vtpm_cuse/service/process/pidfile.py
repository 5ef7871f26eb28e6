"""``--pid``: the process id as decimal digits, without a newline, as scripts expect it.

By hand: python-daemon's is opened and written in one, with its writer's own id and a newline.
"""

from __future__ import annotations

import contextlib
import os
import stat
from typing import TYPE_CHECKING

from vtpm_cuse.errors import UsageError
from vtpm_cuse.files import open_to_write
from vtpm_cuse.service.process.behalf import making, opening

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vtpm_cuse.config import PidConfig, User


class PidFile:
    """The file to come; `open` may need privileges that `write` has no more.

    Args:
        config: Where; None for nowhere.
        exit_status: Of a process that cannot write it.
    """

    def __init__(self, config: PidConfig | None, exit_status: int) -> None:
        self._exit_status = exit_status
        self._path = config.path if config else None
        self.fd = -1 if config is None or config.fd is None else config.fd
        """Open once `open` has been called; -1 where there is to be no pid file."""
        self.paths = _path_of(self.fd) if self._path is None else [os.path.abspath(self._path)]
        """What is removed at the end."""
        self.aside = ""
        """The name that a new one has until it is written: whoever finds it finds a number in it."""
        self._user: User | None = None
        self.ours = self._is_new = False
        """Whether it has been made, or written to, and so is to be removed."""

    def open(self, user: User | None) -> None:
        """Makes the file, for *user*; what another process wrote stays. Raises UsageError."""
        if self._path is not None and self.fd < 0:
            self._user = user
            with self._errors(), making(user, self.paths[0]) as owner:
                is_new = not os.path.lexists(self._path)
                if is_new and user is None:  # another user could not rename it everywhere
                    folder, name = os.path.split(self.paths[0])
                    self.aside = f"{folder}/.{name}.{os.urandom(8).hex()}"
                self.fd = open_to_write(self.aside or self._path, 0o644, owner, append=False)
                self.ours = self._is_new = is_new
        elif self.fd >= 0:
            with contextlib.suppress(OSError):  # said when it is written to
                os.set_inheritable(self.fd, False)

    def write(self, put: Callable[[], None]) -> None:
        """Has *put* write the process id there, to `fd`. Raises UsageError: It cannot be written."""
        if self.fd >= 0:
            self.ours = True
            with self._errors():
                put()

    def write_for(self, process_id: int) -> None:
        """Puts another process' id there. Raises UsageError."""

        def put() -> None:
            write_number(self.fd, process_id)
            if self.aside:
                os.rename(self.aside, self.paths[0])

        with self.discarded():
            self.write(put)

    @contextlib.contextmanager
    def discarded(self) -> Iterator[None]:
        """Where this fails, a file that `open` has made is not left empty."""
        try:
            yield
        except BaseException:
            if self._is_new:
                path = self.aside or self.paths[0]
                with contextlib.suppress(OSError), opening(self._user, path):
                    os.unlink(path)
            raise

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            target = self.fd if self._path is None else self._path
            reason = f"Could not write pid file {target}: {exc.strerror}"
            raise UsageError(reason, self._exit_status) from exc


def write_number(fd: int, process_id: int) -> None:
    """The content of a pid file; what is no file, such as a pipe, has nothing before. OSError."""
    if stat.S_ISREG(os.fstat(fd).st_mode):
        os.ftruncate(fd, 0)
    os.write(fd, b"%d" % process_id)


def _path_of(fd: int) -> list[str]:
    if fd < 0:
        return []
    try:
        return [os.readlink(f"/proc/self/fd/{fd}")]
    except OSError:  # no /proc below this root
        return []
