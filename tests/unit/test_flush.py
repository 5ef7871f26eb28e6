"""What a file system does not offer is no error; a disk that fails is."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import TYPE_CHECKING

import pytest

from vtpm_cuse.errors import StorageError
from vtpm_cuse.files import make_folder, open_to_write, write_output
from vtpm_cuse.manufacture.target import Target
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


CALLS = ["fsync", "fdatasync", "fchmod", "fchown"]


def with_a_mode(folder: Path) -> None:
    for uri in (f"dir://{folder}", f"file://{folder}/state.bin"):
        store = open_store(uri, tpm2=True, mode=0o600)
        store.lock()
        store.store("permall", b"x")
        assert store.load("permall") == b"x"
        store.close()


def of_another(folder: Path) -> None:
    """Owner and mode are handed on."""
    path = folder / "file"
    path.touch()
    if os.geteuid() == 0:
        os.chown(path, 1000, 1000)
    write_output(str(path), b"x", 0o600)
    make_folder(f"{folder}/new", 0o700, (1000, 1000) if os.geteuid() == 0 else None)
    os.close(open_to_write(f"{folder}/log", 0o600, (os.geteuid(), os.getegid()), umask=False))


def files_answer(number: int, patch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    for call in CALLS:
        patch.setattr(os, call, refuse)


all_writes = pytest.mark.parametrize(
    "write",
    [into_directory, with_backup, into_linear_file, file_of_a_tool, with_a_mode, of_another],
)


@pytest.mark.parametrize("number", NOT_OFFERED[:3], ids=errno.errorcode.get)
@all_writes
def test_what_is_not_offered_for_files_is_done_without(
    write: Write, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files_answer(number, monkeypatch)
    write(tmp_path)


@pytest.mark.parametrize("number", [errno.EIO, errno.EBADF], ids=errno.errorcode.get)
@all_writes
def test_a_file_that_the_disk_refuses_is_an_error(
    write: Write, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files_answer(number, monkeypatch)
    with pytest.raises((OSError, StorageError)):
        write(tmp_path)


def test_nothing_is_left_of_a_file_that_a_failed_run_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, path = f"file://{tmp_path}/state.bin", tmp_path / "state.bin"
    with monkeypatch.context() as patch, contextlib.closing(Target(uri, tpm2=True)) as target:
        target.lock()
        files_answer(errno.EIO, patch)
        with pytest.raises(StorageError):
            target.replace({"permall": b"x"})
    assert not path.exists()
    path.touch()
    with monkeypatch.context() as patch, contextlib.closing(Target(uri, tpm2=True)) as target:
        target.lock()
        files_answer(errno.EIO, patch)
        with pytest.raises(StorageError):
            target.replace({"permall": b"x"})
    assert path.exists(), "it was there before"
    path.unlink()
    with contextlib.closing(Target(uri, tpm2=True)) as target:
        target.lock()
        target.replace({"permall": b"x"})
    assert path.exists()


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT], ids=errno.errorcode.get)
@writes
def test_a_disk_that_fails_is_told(
    write: Write, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders_answer(number, monkeypatch)
    with pytest.raises((StorageError, OSError), match=os.strerror(number)):
        write(tmp_path)
