"""A state's URI, and what a program has to prepare and to allow for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support import sockets as s
from vtpm_cuse.errors import UsageError
from vtpm_cuse.storage import locations
from vtpm_cuse.storage.locations import Location
from vtpm_cuse.storage.memory import MemoryStore
from vtpm_cuse.storage.stores import open_store

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("dir:///a/b", Location("dir", "/a/b")),
        ("dir:///a/../b/", Location("dir", "/b")),
        ("file:///a/b", Location("file", "/a/b")),
        ("mem://", Location("mem", "")),
        *(
            (uri, Location("", ""))
            for uri in ("", "dir", "dir://", "file://", "mem", "/a", "x://a")
        ),
        *((uri, Location("", "")) for uri in ("mem://a", "dir:/a", "://a")),
    ],
)
def test_parse(uri: str, expected: Location) -> None:
    assert locations.parse(uri) == expected
    if expected.scheme:
        assert locations.parse(str(expected)) == expected
    else:
        assert locations.absolute(uri) == uri
        with pytest.raises(UsageError, match="Unsupported backend"):
            open_store(uri, tpm2=True)


def test_relative_paths_end_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert locations.absolute("dir://a") == f"dir://{tmp_path}/a"
    assert locations.absolute("file://a") == f"file://{tmp_path}/a"


def test_what_is_needed(tmp_path: Path) -> None:
    file = tmp_path / "state.bin"
    directory = locations.parse(f"dir://{tmp_path}/state")
    assert (directory.folder, directory.folder_to_make) == (f"{tmp_path}/state",) * 2
    linear = locations.parse(f"file://{file}")
    assert (linear.folder, linear.folder_to_make) == (str(tmp_path), "")
    file.touch()
    memory = locations.parse("mem://")
    assert (memory.folder, memory.folder_to_make) == ("", "")


def test_state_in_memory() -> None:
    assert isinstance(open_store("mem://", tpm2=True), MemoryStore)
    with pytest.raises(UsageError, match="backup"):
        open_store("mem://", tpm2=True, backup=True)


def test_a_tpm_in_memory_leaves_nothing(tmp_path: Path) -> None:
    words = ("--tpmstate", "backend-uri=mem://")
    with s.Server(tmp_path, *words) as server:
        for _ in range(2):
            assert server.init() == 0
        assert server.request(s.SHUTDOWN) == bytes(4)
        assert server.wait() == 0
    assert list((tmp_path / "state").iterdir()) == []
