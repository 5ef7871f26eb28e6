"""Replaced files are freed beside the work where that takes long, and lose nobody any room."""

from __future__ import annotations

import contextlib
import errno
import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from vtpm_cuse import files
from vtpm_cuse.errors import StorageError
from vtpm_cuse.storage import disposal
from vtpm_cuse.storage.directory import DirectoryStore
from vtpm_cuse.wire.blob import BlobFlag, with_header

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

BLOBS = [with_header(BlobFlag(0), bytes([number]) * 900) for number in range(256)]


@pytest.fixture
def jobs() -> list[Callable[[], object]]:
    """What the store left to another thread; nobody runs it unless the test does."""
    return []


@pytest.fixture
def store(
    tmp_path: Path, jobs: list[Callable[[], object]], monkeypatch: pytest.MonkeyPatch
) -> Iterator[DirectoryStore]:
    """On a file system that takes long to free files, after it has shown that."""
    monkeypatch.setattr(disposal, "_LONG_SECONDS", 0.0)
    store = DirectoryStore(str(tmp_path), tpm2=True, fsync=False)
    store.defer_to(jobs.append)
    store.store("permall", BLOBS[0])
    yield store
    store.close()


def freed_later(state: Path) -> int:
    """Files below *state* that this process keeps alive without a name."""
    count = 0
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the descriptor of the listing
            link = os.readlink(f"/proc/self/fd/{fd}")
            count += link.startswith(str(state)) and os.fstat(int(fd)).st_nlink == 0
    return count


def test_replaced_files_are_freed_in_the_other_thread(
    store: DirectoryStore, jobs: list[Callable[[], object]], tmp_path: Path
) -> None:
    for number in range(1, 4):
        store.store("permall", BLOBS[number])
        assert freed_later(tmp_path) == len(jobs) == number
    assert store.load("permall") == BLOBS[3]
    store.delete("permall")
    assert freed_later(tmp_path) == len(jobs) == 4
    for job in jobs:
        job()
    assert freed_later(tmp_path) == 0


def test_so_are_replaced_backups(
    tmp_path: Path, jobs: list[Callable[[], object]], store: DirectoryStore
) -> None:
    store.close()
    store = DirectoryStore(str(tmp_path), tpm2=True, fsync=False, backup=True)
    store.defer_to(jobs.append)
    seen = []
    for number in range(1, 4):
        store.store("permall", BLOBS[number])
        seen.append(freed_later(tmp_path))
        while jobs:
            jobs.pop()()
    assert seen == [0, 1, 1]
    assert (tmp_path / "tpm2-00.permall.bak").read_bytes() == BLOBS[2]
    store.close()
    assert freed_later(tmp_path) == 0


def test_close_frees_what_nobody_has_freed(
    store: DirectoryStore, jobs: list[Callable[[], object]], tmp_path: Path
) -> None:
    for blob in BLOBS[1:6]:
        store.store("permall", blob)
    jobs[0]()
    assert freed_later(tmp_path) == 4
    store.close()
    assert freed_later(tmp_path) == 0
    for job in jobs:  # comes too late, and finds nothing
        job()


def test_not_more_than_64_wait(store: DirectoryStore, tmp_path: Path) -> None:
    for blob in BLOBS[1:200]:
        store.store("permall", blob)
    assert freed_later(tmp_path) == 64


def test_a_full_disk_gets_their_room_first(
    store: DirectoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write that fitted before must fit still."""

    def write(fd: int, data: bytes) -> int:
        if freed_later(tmp_path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return os.write(fd, data)

    for blob in BLOBS[1:4]:
        store.store("permall", blob)
    monkeypatch.setattr(files, "os", SimpleNamespace(**{**vars(os), "write": write}))
    store.store("permall", BLOBS[5])
    assert store.load("permall") == BLOBS[5]


def test_a_disk_that_stays_full_is_an_error(
    store: DirectoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*_: Any) -> int:  # noqa: ANN401
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(files, "os", SimpleNamespace(**{**vars(os), "write": write}))
    with pytest.raises(StorageError, match="quota"):
        store.store("permall", BLOBS[1])
    monkeypatch.undo()
    assert store.load("permall") == BLOBS[0]
    assert sorted(os.listdir(tmp_path)) == ["tpm2-00.permall"]


def test_where_it_takes_no_time_nothing_is_left_to_others(
    jobs: list[Callable[[], object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disposal, "_LONG_SECONDS", float("inf"))
    store = DirectoryStore(str(tmp_path), tpm2=True, fsync=False)
    store.defer_to(jobs.append)
    for blob in BLOBS[:5]:
        store.store("permall", blob)
    assert (freed_later(tmp_path), jobs) == (0, [])


def test_nor_where_there_are_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in swtpm_setup, and before a server has its threads."""
    monkeypatch.setattr(disposal, "_LONG_SECONDS", 0.0)
    store = DirectoryStore(str(tmp_path), tpm2=True, fsync=False)
    for blob in BLOBS[:5]:
        store.store("permall", blob)
        assert freed_later(tmp_path) == 0
