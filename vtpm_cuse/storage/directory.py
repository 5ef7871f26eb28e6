"""State as files in a directory, with the C suite's names, modes and lock.

A blob is replaced by writing aside, flushing, renaming and flushing the
directory. The lock is a POSIX record lock on ``.lock``: it belongs to the
process and is lost when any of its descriptors of that file closes, so it is
taken after daemonising and the file is opened nowhere else.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from typing import TYPE_CHECKING, Final

from vtpm_cuse.errors import StateDamaged, StateLocked, StateMissing, StorageError
from vtpm_cuse.storage.base import BLOB_NAMES
from vtpm_cuse.wire.blob import BLOB_SIZE_MAX
from vtpm_cuse.wire.ptm import PtmResult

if TYPE_CHECKING:
    from collections.abc import Iterator

_DEFAULT_MODE: Final = 0o640
_LOCK_NAME: Final = ".lock"
_LOCK_CONFLICT: Final = (errno.EAGAIN, errno.EACCES)


class DirectoryStore:
    """Implements `storage.base.StateStore` on one directory.

    Args:
        path: The directory; it need not exist yet.
        tpm2: Chooses the file names (``tpm2-00.*`` or ``tpm-00.*``).
        mode: Exact mode of state files; None means 0640 less the umask.
        lock: False makes `lock` do nothing.
    """

    def __init__(
        self, path: str, *, tpm2: bool, mode: int | None = None, lock: bool = True
    ) -> None:
        self._path = os.path.abspath(path)
        self._prefix = "tpm2-00" if tpm2 else "tpm-00"
        self._mode = mode
        self._locking = lock
        self._directory_fd = -1
        self._lock_fd = -1

    def load(self, name: str) -> bytes:
        """Returns the blob; a symbolic link or an absurdly large file is damage."""
        file_name = self._file_name(name)
        with self._errors(file_name, reading=True), self._opened(file_name) as fd:
            size = self._checked_size(file_name, os.fstat(fd))
            if self._mode is not None:
                os.fchmod(fd, self._mode)
            with open(fd, "rb", closefd=False) as file:
                return file.read(size + 1)

    def store(self, name: str, blob: bytes) -> None:
        """Replaces the blob, durably."""
        file_name = self._file_name(name)
        aside = file_name.replace("tpm", "TMP", 1)
        with self._errors(file_name):
            try:
                self._write_aside(aside, blob)
                os.replace(aside, file_name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(aside, dir_fd=self._directory)
                raise
            os.fsync(self._directory)

    def delete(self, name: str, *, must_exist: bool = False) -> None:
        """Removes the blob, durably."""
        file_name = self._file_name(name)
        try:
            with self._errors(file_name, reading=True):
                os.unlink(file_name, dir_fd=self._directory)
                os.fsync(self._directory)
        except StateMissing:
            if must_exist:
                raise

    def lock(self) -> None:
        """Takes the record lock on ``.lock``, creating the file if need be."""
        if not self._locking or self._lock_fd >= 0:
            return
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with self._errors(_LOCK_NAME):
            fd = os.open(_LOCK_NAME, flags, 0o660, dir_fd=self._directory)
        try:
            self._checked_size(_LOCK_NAME, os.fstat(fd))
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            os.close(fd)
            reason = f"Could not lock access to lockfile: {exc.strerror}"
            kind = StateLocked if exc.errno in _LOCK_CONFLICT else StorageError
            raise kind(self._full(_LOCK_NAME), reason) from exc
        except StorageError:
            os.close(fd)
            raise
        self._lock_fd = fd

    def unlock(self) -> None:
        """Releases the lock; the file stays."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def sizes(self) -> dict[str, int]:
        """Bytes of each blob's file; a missing directory holds none."""
        found = {}
        for name in BLOB_NAMES:
            with contextlib.suppress(StateMissing):
                found[name] = self._size_of(self._file_name(name))
        return found

    def close(self) -> None:
        """Gives up lock and descriptors."""
        self.unlock()
        if self._directory_fd >= 0:
            os.close(self._directory_fd)
            self._directory_fd = -1

    # -- helpers --------------------------------------------------------------------------

    @property
    def _directory(self) -> int:
        if self._directory_fd < 0:
            self._directory_fd = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        return self._directory_fd

    def _file_name(self, name: str) -> str:
        return f"{self._prefix}.{name}"

    def _full(self, file_name: str) -> str:
        return os.path.join(self._path, file_name)

    @contextlib.contextmanager
    def _opened(self, file_name: str) -> Iterator[int]:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(file_name, flags, dir_fd=self._directory)
        try:
            yield fd
        finally:
            os.close(fd)

    def _write_aside(self, aside: str, blob: bytes) -> None:
        # A file left over by a crash may have another mode, or be somebody's link.
        with contextlib.suppress(FileNotFoundError):
            os.unlink(aside, dir_fd=self._directory)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        mode = _DEFAULT_MODE if self._mode is None else self._mode
        fd = os.open(aside, flags, mode, dir_fd=self._directory)
        try:
            if self._mode is not None:
                os.fchmod(fd, self._mode)
            with open(fd, "wb", closefd=False) as file:
                file.write(blob)
            os.fsync(fd)
        finally:
            os.close(fd)

    def _size_of(self, file_name: str) -> int:
        with self._errors(file_name, reading=True):
            return self._checked_size(
                file_name, os.stat(file_name, dir_fd=self._directory, follow_symlinks=False)
            )

    def _checked_size(self, file_name: str, status: os.stat_result) -> int:
        if not stat.S_ISREG(status.st_mode):
            reason = "is not a regular file"
        elif status.st_size > BLOB_SIZE_MAX:
            reason = f"has {status.st_size} bytes, more than any TPM state"
        else:
            return status.st_size
        raise StateDamaged(self._full(file_name), reason, PtmResult.TPM_FAIL)

    @contextlib.contextmanager
    def _errors(self, file_name: str, *, reading: bool = False) -> Iterator[None]:
        """Only ENOENT means "there is no state"; taking another error for it would destroy one."""
        try:
            yield
        except OSError as exc:
            missing = reading and exc.errno == errno.ENOENT
            kind = StateMissing if missing else StorageError
            raise kind(self._full(file_name), exc.strerror or str(exc)) from exc
