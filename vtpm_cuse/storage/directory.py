"""State as files in a directory, with the C suite's names, modes and lock.

A blob is replaced by writing aside, flushing, renaming and flushing the
directory. With a backup, the permanent state that is replaced stays as
``*.bak``. The lock is a POSIX record lock on ``.lock``: it belongs to the
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

from vtpm_cuse.errors import PtmError, StateDamaged, StateLocked, StateMissing, StorageError
from vtpm_cuse.storage.base import BLOB_NAMES, DEFAULT_MODE, LOCK_CONFLICT, write_all
from vtpm_cuse.storage.disposal import Disposal
from vtpm_cuse.wire.blob import BLOB_SIZE_MAX, split_header_untrusted
from vtpm_cuse.wire.ptm import PtmResult

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from vtpm_cuse.storage.base import Beside

_LOCK_NAME: Final = ".lock"
_BACKUP_SUFFIX: Final = ".bak"
_PERMANENT: Final = BLOB_NAMES[0]


class DirectoryStore:
    """Implements `storage.base.StateStore` on one directory.

    Args:
        path: The directory; it need not exist yet.
        tpm2: Chooses the file names (``tpm2-00.*`` or ``tpm-00.*``).
        mode: Exact mode of state files; None means 0640 less the umask.
        lock: False makes `lock` do nothing.
        fsync: False leaves the flushing to the kernel.
        backup: Keep the last good generation of the permanent state.
    """

    def __init__(
        self,
        path: str,
        *,
        tpm2: bool,
        mode: int | None = None,
        lock: bool = True,
        fsync: bool = True,
        backup: bool = False,
    ) -> None:
        self._path = os.path.abspath(path)
        self._prefix = "tpm2-00" if tpm2 else "tpm-00"
        self._mode = mode
        self._locking = lock
        self._fsync = fsync
        self._backup = backup
        self._disposal = Disposal()
        self._directory_fd = -1
        self._lock_fd = -1

    def load(self, name: str) -> bytes:
        """Returns the blob; a symbolic link or an absurdly large file is damage."""
        return self._load(self._file_name(name))

    def _load(self, file_name: str) -> bytes:
        with self._errors(file_name, reading=True), self._opened(file_name) as fd:
            size = self._checked_size(file_name, os.fstat(fd))
            if self._mode is not None:
                os.fchmod(fd, self._mode)
            # One byte more than there should be: the header's length then does not fit.
            return os.read(fd, size + 1)

    def store(self, name: str, blob: bytes) -> None:
        """Replaces the blob, durably."""
        file_name = self._file_name(name)
        aside = _aside(file_name)
        backup = self._backup and name == _PERMANENT
        with self._errors(file_name):
            try:
                self._write_aside(aside, blob)
                with self._outliving(file_name, *([file_name + _BACKUP_SUFFIX] if backup else [])):
                    if backup:
                        self._keep_backup()
                    self._rename(aside, file_name)
                    self._flush(self._directory)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(aside, dir_fd=self._directory)
                raise

    def delete(self, name: str, *, must_exist: bool = False) -> None:
        """Removes the blob, durably."""
        file_name = self._file_name(name)
        try:
            with self._errors(file_name, reading=True), self._outliving(file_name):
                os.unlink(file_name, dir_fd=self._directory)
                self._flush(self._directory)
        except StateMissing:
            if must_exist:
                raise

    def replace_all(self, blobs: Mapping[str, bytes]) -> None:
        """Makes *blobs* all there is: first goes what only fits the old permanent state."""
        for name in reversed(BLOB_NAMES):
            if name != _PERMANENT or name not in blobs:
                self.delete(name)
        for name in BLOB_NAMES:
            if name in blobs:
                self.store(name, blobs[name])

    def lock(self) -> None:
        """Takes the record lock on ``.lock``, creating the file if need be."""
        if not self._locking or self._lock_fd >= 0:
            return
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            with self._errors(_LOCK_NAME):
                fd = os.open(_LOCK_NAME, flags, 0o660, dir_fd=self._directory)
        except StorageError as exc:
            if os.path.lexists(self._path):
                raise
            reason = f"No such file or directory; 'mkdir -m 700 {self._path}' makes it"
            raise StorageError(self._path, reason) from exc
        try:
            self._checked_size(_LOCK_NAME, os.fstat(fd))
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            os.close(fd)
            reason = f"Could not lock access to lockfile: {exc.strerror}"
            kind = StorageError
            if exc.errno in LOCK_CONFLICT:
                kind, reason = StateLocked, f"{reason}; another process has this TPM"
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

    def where(self, name: str) -> str:
        """The blob's file."""
        return self._full(self._file_name(name))

    def remedy(self, name: str) -> str:
        """Names the last good generation where there is one."""
        path, backup = self.where(name), self._file_name(name) + _BACKUP_SUFFIX
        with contextlib.suppress(StorageError):
            if name == _PERMANENT and self._is_good(backup):
                return (
                    "nothing was changed; the last good generation was kept: to return to it, end "
                    f"the TPM and move {self._full(backup)} to {path}"
                )
        return "nothing was changed: put back a copy that you kept, or move the file away"

    def work_beside(self, beside: Beside) -> None:
        """Replaced files are freed there."""
        self._disposal.beside = beside

    def close(self) -> None:
        """Gives up lock and descriptors."""
        self.unlock()
        self._disposal.catch_up()
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

    def _outliving(self, *file_names: str) -> contextlib.AbstractContextManager[None]:
        return self._disposal.outliving(self._directory, *file_names)

    def _write_aside(self, aside: str, blob: bytes) -> None:
        try:
            self._write_new(aside, blob)
        except OSError as exc:
            if exc.errno not in {errno.ENOSPC, errno.EDQUOT}:
                raise
            self._disposal.catch_up()  # the room may be that of files replaced a moment ago
            self._write_new(aside, blob)

    def _write_new(self, aside: str, blob: bytes) -> None:
        try:
            fd = self._created(aside)
        except FileExistsError:
            # Left over by a crash: it may have another mode, or be somebody's link.
            os.unlink(aside, dir_fd=self._directory)
            fd = self._created(aside)
        try:
            if self._mode is not None:
                os.fchmod(fd, self._mode)
            write_all(lambda rest, _done: os.write(fd, rest), blob)
            self._flush(fd)
        finally:
            os.close(fd)

    def _created(self, file_name: str) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        mode = DEFAULT_MODE if self._mode is None else self._mode
        return os.open(file_name, flags, mode, dir_fd=self._directory)

    def _rename(self, old: str, new: str) -> None:
        os.replace(old, new, src_dir_fd=self._directory, dst_dir_fd=self._directory)

    def _flush(self, fd: int) -> None:
        if self._fsync:
            os.fsync(fd)

    def _keep_backup(self) -> None:
        """A second name for the present file, which the next rename takes its own from."""
        file_name = self._file_name(_PERMANENT)
        if not self._is_good(file_name):
            return
        backup, aside = file_name + _BACKUP_SUFFIX, _aside(file_name + _BACKUP_SUFFIX)
        directory = self._directory
        with contextlib.suppress(FileNotFoundError):
            os.unlink(aside, dir_fd=directory)
        os.link(file_name, aside, src_dir_fd=directory, dst_dir_fd=directory)
        self._rename(aside, backup)
        with contextlib.suppress(FileNotFoundError):  # left when both were one file already
            os.unlink(aside, dir_fd=directory)

    def _is_good(self, file_name: str) -> bool:
        """Whether the file is there and its header fits. Raises StorageError."""
        try:
            split_header_untrusted(self._load(file_name))
        except (PtmError, StateMissing, StateDamaged):
            return False
        return True

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


def _aside(file_name: str) -> str:
    """Where the file is written before it gets its name."""
    return file_name.replace("tpm", "TMP", 1)
