"""State as files in a directory, with the C suite's names, modes and lock.

A blob is replaced by writing aside, flushing, renaming and flushing the
directory. With a backup, the permanent state that is replaced stays as
``*.bak``. Whole files that were written aside are taken for a TPM's, too;
so a first permanent state is written under another name than later ones.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
from typing import TYPE_CHECKING, Final

from vtpm_cuse.errors import BlobError, StateDamaged, StateLocked, StateMissing, StorageError
from vtpm_cuse.files import flush, flush_folder, set_mode, write_all
from vtpm_cuse.storage import modes
from vtpm_cuse.storage.base import (
    BACKUP_SUFFIX,
    BLOB_NAMES,
    DEFAULT_MODE,
    GONE,
    LOCK_CONFLICT,
    PERMANENT,
    REPLACED,
    left_over,
)
from vtpm_cuse.storage.disposal import Disposal
from vtpm_cuse.storage.locking import give_up_lock, take_lock
from vtpm_cuse.storage.modes import (
    FIRST_SUFFIX,
    LOCK_NAME,
    PREFIXES,
    SWAP_SUFFIX,
    aside_of,
)
from vtpm_cuse.wire.blob import BLOB_SIZE_MAX, split_header_untrusted
from vtpm_cuse.wire.ptm import PtmResult

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from vtpm_cuse.storage.base import RunLater

log = logging.getLogger(__name__)

_LOCK_MODE: Final = 0o660
_NO_LINKS: Final = {
    *(errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK),
    *(errno.ENOSYS, errno.EINVAL, errno.EXDEV, errno.EACCES),
}
"""How file systems, network servers and security modules refuse a second name for a file."""


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
        self._prefix = PREFIXES[tpm2]
        self._starts_from_backup = backup and tpm2  # as in the C suite; a TPM 1.2 is told of it
        self._mode = mode
        self._locking = lock
        self._fsync = fsync
        self._backup = backup
        self._disposal = Disposal()
        self._directory_fd = -1
        self._lock_fd = -1
        self._replaced = self._settled = False

    def load(self, name: str) -> bytes:
        """Returns the blob; a symbolic link or an absurdly large file is damage."""
        try:
            return self._load(self._file_name(name))
        except StateMissing:
            if name == PERMANENT and (left := self.remains()):
                raise left_over(self, left) from None
            raise

    def _load(self, file_name: str) -> bytes:
        with self._errors(file_name, reading=True), self._opened(file_name) as fd:
            size = self._checked_size(file_name, os.fstat(fd))
            if self._mode is not None:
                self._give_mode(fd, self._mode)
            # One byte more than there should be: the header's length then does not fit.
            return os.read(fd, size + 1)

    def store(self, name: str, blob: bytes) -> None:
        """Replaces the blob, durably."""
        self._keep_locked()
        file_name = self._file_name(name)
        aside = aside_of(file_name)
        backup = self._backup and name == PERMANENT
        with self._errors(file_name):
            if name == PERMANENT:
                aside = self._aside_of_permanent()
            try:
                self._write_aside(aside, blob)
                with self._freed_later(file_name, *([file_name + BACKUP_SUFFIX] if backup else [])):
                    if backup and self._is_good(file_name):
                        self._put(file_name, file_name + BACKUP_SUFFIX)
                    self._settled = False
                    self._rename(aside, file_name)
                    self._flush_directory()
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(aside, dir_fd=self._directory)
                raise

    def delete(self, name: str, *, must_exist: bool = False) -> None:
        """Removes the blob, durably."""
        self._keep_locked()
        file_name = self._file_name(name)
        try:
            with self._errors(file_name, reading=True), self._freed_later(file_name):
                os.unlink(file_name, dir_fd=self._directory)
                self._flush_directory()
        except StateMissing:
            if must_exist:
                raise

    def replace_all(self, blobs: Mapping[str, bytes]) -> None:
        """Makes *blobs* all there is: first goes what only fits the old permanent state."""
        permanent = self._permanent
        with self._errors(permanent):
            for file_name in self._other_generations():
                if self._is_there(file_name):
                    os.unlink(file_name, dir_fd=self._directory)
        for name in reversed(BLOB_NAMES):
            if name != PERMANENT or name not in blobs:
                self.delete(name)
        for name in BLOB_NAMES:
            if name in blobs:
                self.store(name, blobs[name])

    def refresh(self) -> None:
        """The directory that the path leads to now, and the lock file that is in it."""
        if self._directory_fd < 0:
            return
        if not self._is_at(self._path, self._directory_fd):
            log.warning("The state directory %s is another one than before", self._path)
            self.close()
            self._replaced = True
        elif self._lock_fd >= 0 and not self._is_at(LOCK_NAME, self._lock_fd, self._directory):
            self.unlock()

    def lock(self) -> None:
        """Takes the lock on ``.lock``, creating the file if need be."""
        if not self._locking or self._lock_fd >= 0:
            return
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            with self._errors(LOCK_NAME):
                mode = modes.of_new(_LOCK_MODE, None)
                fd = os.open(LOCK_NAME, flags, mode, dir_fd=self._directory)
        except StorageError as exc:
            if self._replaced or os.path.lexists(self._path):
                raise
            reason = f"No such file or directory; 'mkdir -m 700 {self._path}' makes it"
            raise StorageError(self._path, reason) from exc
        try:
            self._checked_size(LOCK_NAME, os.fstat(fd))
            self._give_mode(fd, None)
            take_lock(fd)
        except OSError as exc:
            os.close(fd)
            # Scripts look for these words, the name of the C suite's function among them.
            words = "SWTPM_NVRAM_Lock_Dir: Could not lock access to lockfile"
            reason = f"{words}: {exc.strerror}"
            kind = StorageError
            if exc.errno in LOCK_CONFLICT:
                kind, reason = StateLocked, f"{reason}; another process has this TPM"
            raise kind(self._full(LOCK_NAME), reason) from exc
        except StorageError:
            os.close(fd)
            raise
        self._lock_fd = fd

    @property
    def lock_fd(self) -> int | None:
        """The descriptor that has the lock, if there is one."""
        return self._lock_fd if self._lock_fd >= 0 else None

    def leave(self) -> None:
        """Another process is to take over the lock, by that descriptor."""
        self._lock_fd = -1

    def take_over(self, lock: int | None) -> None:
        """Has the lock by a descriptor that a process has left. Raises StateLocked: it has not."""
        if lock is None:
            return
        self._lock_fd = lock
        try:
            take_lock(lock)  # again, for that process may have given it up
        except OSError as exc:
            raise StateLocked(self._full(LOCK_NAME), f"it is another's: {exc.strerror}") from exc

    def unlock(self) -> None:
        """Releases the lock; the file stays."""
        if self._lock_fd >= 0:
            with contextlib.suppress(OSError):  # then closing it must do
                give_up_lock(self._lock_fd)
            os.close(self._lock_fd)
            self._lock_fd = -1

    def sizes(self) -> dict[str, int]:
        """Bytes of each blob's file; a missing directory holds none."""
        found = {}
        for name in BLOB_NAMES:
            with contextlib.suppress(StateMissing):
                found[name] = self._size_of(self._file_name(name))
        return found

    def remains(self) -> str:
        """A backup, another state, or a whole file that was written aside."""
        permanent = self._permanent
        with self._errors(permanent):
            try:
                if self._is_there(permanent):
                    return ""
            except FileNotFoundError:  # the directory itself
                return ""
            for file_name in (
                *(permanent + suffix for suffix in (BACKUP_SUFFIX, SWAP_SUFFIX)),
                *(self._file_name(name) for name in BLOB_NAMES[1:]),
            ):
                if self._is_there(file_name):
                    return self._full(file_name)
            asides = (name for name in self._other_generations() if self._is_good(name))
            return next(map(self._full, asides), "")

    def restore_backup(self) -> str:
        """The backup gets a second name, which the next write takes from it."""
        permanent, backup = self._permanent, self._permanent + BACKUP_SUFFIX
        if not self._starts_from_backup:
            return ""
        with self._errors(permanent):
            if not self._is_good(backup):
                return ""
            if self._is_there(permanent + SWAP_SUFFIX) and (
                not self._is_there(permanent) or self._is_same(permanent, backup)
            ):
                log.warning("A start from %s was cut off", self._full(backup))
                self.end_try(accepted=False)
            if self._is_there(permanent):
                return ""
            self._put(backup, permanent)
            self._flush_directory()
        return self._full(backup)

    def try_backup(self) -> str:
        """The refused state is kept under a third name: a crash is then seen to be one."""
        permanent, backup = self._permanent, self._permanent + BACKUP_SUFFIX
        if not self._starts_from_backup or not self._is_good(backup):
            return ""
        try:
            if self._is_same(permanent, backup):
                return ""
        except (StateMissing, StateDamaged):  # such as a directory in the place of the file
            return ""
        with self._errors(permanent):
            self._put(permanent, permanent + SWAP_SUFFIX)
            self._flush_directory()
            self._put(backup, permanent)
            self._flush_directory()
        return self._full(backup)

    def end_try(self, *, accepted: bool) -> None:
        """Gives the refused state its place."""
        refused = self._permanent + SWAP_SUFFIX
        with self._errors(self._permanent):
            self._put(refused, self._permanent + BACKUP_SUFFIX if accepted else self._permanent)
            self._flush_directory()
            os.unlink(refused, dir_fd=self._directory)

    def where(self, name: str) -> str:
        """The blob's file."""
        return self._full(self._file_name(name))

    def remedy(self, name: str) -> str:
        """Names the last good generation where there is one."""
        if name != PERMANENT:
            return (
                "nothing was changed, and the permanent state is not at fault: put back a copy "
                "that you kept, or keep the file elsewhere: the TPM then starts as after a power cut"
            )
        path, backup = self.where(name), self._file_name(name) + BACKUP_SUFFIX
        with contextlib.suppress(StorageError):
            if self._is_good(backup):
                kept = (
                    f"nothing was changed; the last good generation was kept: {self._full(backup)}"
                )
                if self._prefix == "tpm2-00" and not self._starts_from_backup:
                    return f"{kept}; the option 'backup' of --tpmstate starts the TPM from it"
                return (
                    f"{kept}; to return to it, end the TPM, keep {path} elsewhere and copy it there"
                )
        return "nothing was changed: put back a copy that you kept, or use another directory"

    def use_of_backup(self) -> str:
        """It can be started from if it is whole."""
        if not self._is_good(self._permanent + BACKUP_SUFFIX):
            return "the backup is damaged: put back a copy of the state that you kept"
        if self._starts_from_backup or self._prefix != "tpm2-00":
            return "copy it there to start from it"
        return "give the option 'backup' to start from it, or copy it there"

    def defer_to(self, run_later: RunLater) -> None:
        """Replaced files are freed there."""
        self._disposal.run_later = run_later

    def close(self) -> None:
        """Gives up lock and descriptors."""
        self.unlock()
        self._disposal.catch_up()
        if self._directory_fd >= 0:
            os.close(self._directory_fd)
            self._directory_fd = -1
            self._settled = False

    # -- helpers --------------------------------------------------------------------------

    @property
    def _directory(self) -> int:
        if self._directory_fd < 0:
            try:
                flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
                self._directory_fd = os.open(self._path, flags)
            except (PermissionError, FileNotFoundError) as exc:
                if self._replaced:
                    reason = REPLACED if isinstance(exc, PermissionError) else GONE
                    raise StorageError(self._path, reason) from exc
                raise
        return self._directory_fd

    def _file_name(self, name: str) -> str:
        return f"{self._prefix}.{name}"

    @property
    def _permanent(self) -> str:
        return self._file_name(PERMANENT)

    def _full(self, file_name: str) -> str:
        return os.path.join(self._path, file_name)

    def _is_there(self, file_name: str) -> bool:
        """Whether anything has that name. Raises OSError, also where there is no directory."""
        directory = self._directory
        try:
            os.stat(file_name, dir_fd=directory, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def _is_at(self, path: str, fd: int, directory: int | None = None) -> bool:
        """Whether *path* still leads to what *fd* is."""
        with self._errors(path):
            try:
                found = os.stat(path, dir_fd=directory)
            except FileNotFoundError:
                return False
            return os.path.samestat(found, os.fstat(fd))

    def _other_generations(self) -> list[str]:
        """The names that another permanent state than the present one may have."""
        permanent = self._permanent
        kept = [permanent, permanent + BACKUP_SUFFIX, permanent + SWAP_SUFFIX]
        return [*kept[1:], *map(aside_of, kept)]

    def _keep_locked(self) -> None:
        """A lock file that somebody removed keeps nobody off: takes the lock on the one there now."""
        if self._lock_fd < 0 or self._is_at(LOCK_NAME, self._lock_fd, self._directory):
            return
        stale, self._lock_fd = self._lock_fd, -1
        try:
            self.lock()
        except BaseException:
            self._lock_fd = stale  # the next write tries again
            raise
        os.close(stale)

    @contextlib.contextmanager
    def _opened(self, file_name: str) -> Iterator[int]:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(file_name, flags, dir_fd=self._directory)
        try:
            yield fd
        finally:
            os.close(fd)

    def _freed_later(self, *file_names: str) -> contextlib.AbstractContextManager[None]:
        return self._disposal.freed_later(self._directory, *file_names)

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
            self._give_mode(fd, self._mode)
            write_all(fd, blob)
            if self._fsync:
                flush(fd)
        finally:
            os.close(fd)

    def _created(self, file_name: str) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        mode = modes.of_new(DEFAULT_MODE, self._mode)
        return os.open(file_name, flags, mode, dir_fd=self._directory)

    def _rename(self, old: str, new: str) -> None:
        os.replace(old, new, src_dir_fd=self._directory, dst_dir_fd=self._directory)

    @staticmethod
    def _give_mode(fd: int, exact: int | None) -> None:
        if (mode := modes.to_give(os.fstat(fd), exact)) is not None:
            set_mode(fd, mode)

    def _flush_directory(self) -> None:
        if self._fsync:
            flush_folder(self._directory)
        self._settled = True

    def _aside_of_permanent(self) -> str:
        """Where the permanent state is written first.

        What a crash leaves of the very first one must not look like what is left of a TPM. Where
        there is one, its name is on the disk before anything is written beside it: whoever gave it
        that name may have died before the flush.
        """
        permanent = self._permanent
        aside = aside_of(permanent)
        if not self._is_there(permanent):
            self._unlink(aside)
            return aside + FIRST_SUFFIX
        if not self._settled:
            self._flush_directory()
        return aside

    def _unlink(self, file_name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(file_name, dir_fd=self._directory)

    def _put(self, source: str, target: str) -> None:
        """*target* becomes a second name of the file *source*, or a copy where there can be none."""
        directory, aside = self._directory, aside_of(target)
        self._unlink(aside)
        try:
            try:
                os.link(source, aside, src_dir_fd=directory, dst_dir_fd=directory)
            except OSError as exc:
                if exc.errno not in _NO_LINKS:
                    raise
                self._write_aside(aside, self._load(source))
            self._rename(aside, target)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(aside, dir_fd=directory)
            raise
        self._unlink(aside)  # left when both were one file already

    def _is_same(self, one: str, other: str) -> bool:
        """Whether both files hold the same. Raises StorageError."""
        return self._load(one) == self._load(other)

    def _is_good(self, file_name: str) -> bool:
        """Whether the file is there and its header fits. Raises StorageError."""
        try:
            split_header_untrusted(self._load(file_name))
        except (BlobError, StateMissing, StateDamaged):
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
