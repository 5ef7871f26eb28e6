"""What a file system does not offer for folders is no error; a disk that fails is."""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING

import pytest

from vtpm_cuse.errors import StorageError
from vtpm_cuse.files import write_output
from vtpm_cuse.storage.stores import open_store

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Write = Callable[[Path], None]

NOT_OFFERED = [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF]


def into_directory(folder: Path, *, backup: bool = False) -> None:
    store = open_store(f"dir://{folder}", tpm2=True, backup=backup)
    store.store("volatilestate", b"x")
    store.store("permall", b"x")
    store.store("permall", b"x")
    store.delete("volatilestate")
    store.close()


def with_backup(folder: Path) -> None:
    into_directory(folder, backup=True)


def into_linear_file(folder: Path) -> None:
    store = open_store(f"file://{folder}/state.bin", tpm2=True)
    store.store("permall", b"x")
    store.close()


def file_of_a_tool(folder: Path) -> None:
    """A key, a certificate, a serial number, what swtpm_ioctl --save gets."""
    write_output(f"{folder}/file", b"x", 0o600)


writes = pytest.mark.parametrize(
    "write", [into_directory, with_backup, into_linear_file, file_of_a_tool]
)


def folders_answer(number: int, patch: pytest.MonkeyPatch) -> list[int]:
    """Flushing any folder fails; the list gets an entry each time."""
    real, asked = os.fsync, []

    def fsync(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            asked.append(fd)
            raise OSError(number, os.strerror(number))
        real(fd)

    patch.setattr(os, "fsync", fsync)
    return asked


@pytest.mark.parametrize("number", NOT_OFFERED, ids=errno.errorcode.get)
@writes
def test_folders_that_cannot_be_flushed_are_written_to(
    write: Write, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = folders_answer(number, monkeypatch)
    write(tmp_path)
    assert asked
    assert list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT], ids=errno.errorcode.get)
@writes
def test_a_disk_that_fails_is_told(
    write: Write, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders_answer(number, monkeypatch)
    with pytest.raises((StorageError, OSError), match=os.strerror(number)):
        write(tmp_path)
