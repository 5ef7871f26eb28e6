"""State in one file or on one block device, in the C suite's linear format.

A blob is replaced by writing the new one where nothing is, flushing, and writing
the header, which is one sector. Before space is used again that a header has freed,
that header is known to be on the disk. The lock is on the file itself.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
from typing import TYPE_CHECKING, Final

from vtpm_cuse.errors import (
    BlobError,
    StateDamaged,
    StateLocked,
    StateMissing,
    StateNoRoom,
    StorageError,
)
from vtpm_cuse.files import flush, flush_folder, set_mode, write_all
from vtpm_cuse.storage import modes
from vtpm_cuse.storage.base import (
    BLOB_NAMES,
    DEFAULT_MODE,
    GONE,
    LOCK_CONFLICT,
    PERMANENT,
    REPLACED,
    WithoutBackup,
    left_over,
)
from vtpm_cuse.storage.locking import give_up_lock, take_lock
from vtpm_cuse.wire.linear import (
    EMPTY_TABLE,
    LINEAR_END_MAX,
    LINEAR_HEADER_SIZE,
    is_emptied,
    pack_header,
    unpack_header_untrusted,
    with_changes,
)
from vtpm_cuse.wire.ptm import PtmResult

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from vtpm_cuse.wire.linear import Table

log = logging.getLogger(__name__)

_BLANK_CHECK: Final = 1 << 20
"""Bytes at either end that must be zero before a device counts as empty: where file systems,
partition tables and volume managers keep what they recognise themselves by."""


class LinearStore(WithoutBackup):
    """Implements `storage.base.StateStore` on one file or block device.

    Args:
        path: The file, which need not exist yet, or a block device or a link to one.
        mode: Exact mode of the file; None means 0640 less the umask for a new one.
        lock: False makes `lock` do nothing.
        fsync: False leaves the flushing to the kernel.
    """

    def __init__(
        self, path: str, *, mode: int | None = None, lock: bool = True, fsync: bool = True
    ) -> None:
        self._path = os.path.abspath(path)
        self._mode = mode
        self._locking = lock
        self._fsync = fsync
        self._fd = -1
        self._locked = self._settled = self._replaced = False
        self._checked: tuple[bytes, int, Table] = b"", 0, EMPTY_TABLE

    def load(self, name: str) -> bytes:
        """Returns the blob."""
        with self._errors(reading=True):
            fd = self._open(create=False)
            section = self._table(fd)[BLOB_NAMES.index(name)]
            if not section.used:
                if name == PERMANENT and (left := self.remains()):
                    raise left_over(self, left)
                raise StateMissing(self._path, f"has no {name}")
            data = os.pread(fd, section.data_length, section.offset)
        if len(data) != section.data_length:
            raise self._damaged(f"{len(data)} of {section.data_length} bytes of {name} are there")
        return data

    def store(self, name: str, blob: bytes) -> None:
        """Replaces the blob; one that has no room beside the old one is refused."""
        self._commit({name: blob})

    def delete(self, name: str, *, must_exist: bool = False) -> None:
        """Removes the blob; the file keeps its size."""
        try:
            with self._errors(reading=True):
                there = self._table(self._open(create=False))[BLOB_NAMES.index(name)].used
        except StateMissing:
            there = False
        if there:
            self._commit({name: None})
        elif must_exist:
            raise StateMissing(self._path, f"has no {name}")

    def replace_all(self, blobs: Mapping[str, bytes]) -> None:
        """Makes *blobs* all there is, with one write of the header."""
        self._commit({name: blobs.get(name) for name in BLOB_NAMES})

    def refresh(self) -> None:
        """The file or device that the path leads to now."""
        if self._fd < 0:
            return
        with self._errors():
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(self._path), os.fstat(self._fd)):
                    return
            log.warning("The state file %s is another one than before", self._path)
            self.close()
            self._replaced = True

    def lock(self) -> None:
        """Takes the lock on the file, creating an empty one if need be."""
        if not self._locking or self._locked:
            return
        with self._errors():
            fd = self._open(create=True)
        try:
            take_lock(fd)
        except OSError as exc:
            self.close()
            reason = f"Could not lock access: {exc.strerror}"
            kind = StateLocked if exc.errno in LOCK_CONFLICT else StorageError
            raise kind(self._path, reason) from exc
        # Another host may have written to a shared device since these pages were read.
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        self._locked = True

    def unlock(self) -> None:
        """Releases the lock."""
        if self._locked:
            give_up_lock(self._fd)
            self._locked = self._settled = False

    def sizes(self) -> dict[str, int]:
        """Bytes of each blob; a file that is missing or empty holds none, and stays so."""
        try:
            with self._errors(reading=True):
                if self._fd >= 0:
                    table = self._table(self._fd)
                else:
                    fd = self._opened(os.O_RDONLY)
                    try:
                        table = self._table(fd)
                    finally:
                        os.close(fd)
        except StateMissing:
            return {}
        named = zip(BLOB_NAMES, table, strict=False)
        return {name: section.data_length for name, section in named if section.used}

    def remains(self) -> str:
        """Another blob without the permanent one."""
        sizes = self.sizes()
        return "" if PERMANENT in sizes or not sizes else self.where(next(iter(sizes)))

    def where(self, name: str) -> str:
        """The file, and which of its blobs."""
        return f"{self._path} ({name})"

    def remedy(self, name: str) -> str:
        """What can be done about damage."""
        if name != PERMANENT:
            return (
                "nothing was changed, and the permanent state is not at fault: put back a copy of "
                "the whole file that you kept"
            )
        return "nothing was changed: put back a copy that you kept, or use another file"

    def close(self) -> None:
        """Gives up lock and descriptor."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):  # then closing it must do
                self.unlock()
            os.close(self._fd)
            self._fd = -1
            self._checked = b"", 0, EMPTY_TABLE
            self._locked = self._settled = False

    # -- writing --------------------------------------------------------------------------

    def _commit(self, changes: Mapping[str, bytes | None]) -> None:
        with self._errors():
            fd = self._open(create=True)
            if os.fstat(fd).st_nlink == 0:
                reason = "the file was removed, or replaced: what is written there would be lost"
                raise StorageError(self._path, reason)
            old = self._table(fd)
            self._settle(fd, old)
            size, fixed = os.lseek(fd, 0, os.SEEK_END), self._is_device(fd)
            lengths = {
                BLOB_NAMES.index(name): None if blob is None else len(blob)
                for name, blob in changes.items()
            }
            new = with_changes(old, lengths, size if fixed else LINEAR_END_MAX)
            if new is None:
                raise StateNoRoom(
                    self._path,
                    f"the {size} bytes of the device have no room for the new state beside the old",
                )
            for name, blob in changes.items():
                section = new[BLOB_NAMES.index(name)]
                if blob is not None:
                    if section.end > size and not fixed:
                        # Really there, so that no later write into it finds the disk full.
                        os.posix_fallocate(fd, size, section.end - size)
                        size = section.end
                    write_all(fd, blob, section.offset)
            self._flush(fd)
            header = pack_header(new)
            self._settled = False
            write_all(fd, header, 0)
            self._flush(fd)
            self._settled = True
            self._checked = header, size, new

    def _settle(self, fd: int, table: Table) -> None:
        """Before the first write: puts the header on the disk, and the file's name.

        One that was read may be in the page cache only, when its writer died or its flush failed;
        the space that it leaves free may then be in use by the header on the disk. One that was
        not there yet must be there before any data, which would look like something else's.
        """
        if not self._settled:
            write_all(fd, pack_header(table), 0)
            self._flush(fd)
            if not self._is_device(fd):
                self._flush_directory()
            self._settled = True

    def _flush(self, fd: int) -> None:
        if self._fsync:
            flush(fd, only_data=True)

    def _flush_directory(self) -> None:
        if not self._fsync:
            return
        try:
            directory = os.open(os.path.dirname(self._path), os.O_RDONLY | os.O_CLOEXEC)
        except PermissionError:  # then it is not ours, and nor was it to make the file there
            return
        try:
            flush_folder(directory)
        finally:
            os.close(directory)

    # -- the file -------------------------------------------------------------------------

    def _open(self, *, create: bool) -> int:
        if self._fd < 0:
            fd = self._opened(os.O_RDWR | (os.O_CREAT if create else 0))
            try:
                if not self._is_device(fd):
                    self._set_mode(fd)
            except BaseException:
                os.close(fd)
                raise
            self._fd = fd
        return self._fd

    def _set_mode(self, fd: int) -> None:
        if (mode := modes.to_give(os.fstat(fd), self._mode)) is not None:
            set_mode(fd, mode)

    def _opened(self, flags: int) -> int:
        flags |= os.O_NONBLOCK | os.O_CLOEXEC
        if self._replaced:  # a TPM was here: no new one begins in its place
            flags &= ~os.O_CREAT
        mode = modes.of_new(DEFAULT_MODE, self._mode)
        try:
            fd = os.open(self._path, flags | os.O_NOFOLLOW, mode)
            devices_only = False
        except OSError as exc:
            if self._replaced and exc.errno == errno.EACCES:
                raise StorageError(self._path, REPLACED) from exc
            if self._replaced and exc.errno == errno.ENOENT:
                raise StorageError(self._path, GONE) from exc
            if exc.errno != errno.ELOOP:
                raise
            # /dev is full of links to block devices; a link to anything else is refused.
            if not stat.S_ISBLK(os.stat(self._path).st_mode):
                raise self._damaged("is a symbolic link") from None
            fd = os.open(self._path, flags & ~os.O_CREAT)
            devices_only = True
        kind = os.fstat(fd).st_mode
        if stat.S_ISBLK(kind) or (stat.S_ISREG(kind) and not devices_only):
            return fd
        os.close(fd)
        what = "is a symbolic link" if devices_only else "is neither a file nor a block device"
        raise self._damaged(what)

    @staticmethod
    def _is_device(fd: int) -> bool:
        return stat.S_ISBLK(os.fstat(fd).st_mode)

    def _table(self, fd: int) -> Table:
        """The checked table; an empty one where nothing was ever written."""
        header = os.pread(fd, LINEAR_HEADER_SIZE, 0)
        size = os.lseek(fd, 0, os.SEEK_END)
        if header and (header, size) == self._checked[:2]:  # saves 20 of 40 us a write
            return self._checked[2]
        if self._is_device(fd) and size < LINEAR_HEADER_SIZE:
            raise StateNoRoom(self._path, f"the device has {size} bytes only")
        if is_emptied(header) or self._is_blank(fd, header, size):
            return EMPTY_TABLE
        try:
            table = unpack_header_untrusted(header, size)
        except BlobError as exc:
            raise self._damaged(exc.reason) from exc
        self._checked = header, size, table
        return table

    @staticmethod
    def _is_blank(fd: int, header: bytes, size: int) -> bool:
        if header.strip(b"\0"):
            return False
        places = 0, max(0, size - _BLANK_CHECK)
        return not any(os.pread(fd, _BLANK_CHECK, place).strip(b"\0") for place in places)

    def _damaged(self, reason: str) -> StateDamaged:
        return StateDamaged(self._path, reason, PtmResult.TPM_FAIL)

    @contextlib.contextmanager
    def _errors(self, *, reading: bool = False) -> Iterator[None]:
        """Only a file that does not exist means "there is no state"."""
        try:
            yield
        except OSError as exc:
            missing = reading and exc.errno == errno.ENOENT
            kind = StateMissing if missing else StorageError
            raise kind(self._path, exc.strerror or str(exc)) from exc
