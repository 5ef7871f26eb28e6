"""The linear store on real files: layout, modes, lock, and what is refused instead of formatted."""

from __future__ import annotations

import fcntl
import os
import struct
from typing import TYPE_CHECKING

import pytest

from tests.support.files import descriptors_closed, open_descriptors, umask
from tests.support.processes import in_child
from vtpm_cuse.errors import StateDamaged, StateLocked, StateMissing, StorageError, UsageError
from vtpm_cuse.storage.linear import LinearStore
from vtpm_cuse.storage.stores import open_store

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

MAGIC = bytes.fromhex("6e696c6d70747773")
HEAD = MAGIC + struct.pack("<BBH", 1, 0, 192)
SIZE_FIELDS = [0, 191, 193, 0xFFFF]


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    """Tests leave stores open that nobody closes."""
    with descriptors_closed():
        yield


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.bin"


@pytest.fixture
def store(path: Path) -> LinearStore:
    return LinearStore(str(path))


def slots(path: Path) -> list[tuple[int, ...]]:
    data = path.read_bytes()
    return [struct.unpack_from("<III", data, 12 + 12 * slot) for slot in range(15)]


def image(sections: Sequence[tuple[int, int, int]], size: int = 8192, head: bytes = HEAD) -> bytes:
    """A store with these slots, its sections full of "x"."""
    table = b"".join(struct.pack("<III", *section) for section in sections).ljust(180, b"\0")
    return (head + table).ljust(size, b"x")


def refused(path: Path, data: bytes) -> str:
    """Why the store is refused, on reading and on writing alike; the file stays as it is."""
    path.write_bytes(data)
    store = LinearStore(str(path))
    with pytest.raises(StateDamaged) as caught:
        store.load("permall")
    for action in (
        lambda: store.store("permall", b"new"),
        lambda: store.delete("permall"),
        lambda: store.replace_all({}),
        store.sizes,
        lambda: LinearStore(str(path)).sizes(),
    ):
        with pytest.raises(StateDamaged):
            action()
    store.close()
    assert path.read_bytes() == data
    assert caught.value.path == str(path)
    return caught.value.reason


# -- layout -------------------------------------------------------------------------------


def test_layout(store: LinearStore, path: Path) -> None:
    store.store("permall", b"p" * 1315)
    store.store("volatilestate", b"v" * 8922)
    data = path.read_bytes()
    assert data[:12] == HEAD
    assert slots(path) == [(4096, 1315, 2048), (8192, 8922, 16384)] + [(0, 0, 0)] * 13
    assert data[4096 : 4096 + 1315] == b"p" * 1315
    assert len(data) == 8192 + 16384, "the whole section is there, as the C suite expects"


def test_round_trips(store: LinearStore, path: Path) -> None:
    kept = {}
    for turn in range(30):
        for name in ("permall", "volatilestate", "savestate"):
            kept[name] = bytes([turn]) * (turn * 397 % 6000)
            store.store(name, kept[name])
            assert {one: store.load(one) for one in kept} == kept
            assert {one: LinearStore(str(path)).load(one) for one in kept} == kept
    assert path.stat().st_size <= 8 * 8192, "space is used again"
    assert store.sizes() == {name: len(data) for name, data in kept.items()}


def test_sections_never_overlap_while_they_move(store: LinearStore, path: Path) -> None:
    for turn in range(200):
        store.store(("permall", "volatilestate", "savestate")[turn % 3], bytes(turn * 89 % 5000))
        used = sorted(section for section in slots(path) if section[0])
        ends = [192, *(offset + room for offset, _, room in used)]
        assert all(end <= section[0] for end, section in zip(ends, used, strict=False))
        assert all(length <= room for _, length, room in used)
        assert ends[-1] <= path.stat().st_size


def test_empty_blob(store: LinearStore) -> None:
    store.store("permall", b"")
    assert store.load("permall") == b""
    assert store.sizes() == {"permall": 0}


def test_delete(store: LinearStore, path: Path) -> None:
    with pytest.raises(StateMissing):
        store.delete("permall", must_exist=True)
    store.delete("permall")
    assert not path.exists()
    store.store("permall", b"x")
    store.delete("permall", must_exist=True)
    assert store.sizes() == {}
    with pytest.raises(StateMissing):
        store.load("permall")
    with pytest.raises(StateMissing):
        store.delete("permall", must_exist=True)


def test_replace_all(store: LinearStore) -> None:
    store.store("permall", b"old")
    store.store("volatilestate", b"old volatile")
    store.replace_all({"permall": b"new", "savestate": b"new savestate"})
    assert store.sizes() == {"permall": 3, "savestate": 13}
    assert (store.load("permall"), store.load("savestate")) == (b"new", b"new savestate")


def test_open_store(path: Path) -> None:
    store = open_store(f"file://{path}", tpm2=True, mode=0o604)
    store.store("permall", b"x")
    assert path.stat().st_mode & 0o7777 == 0o604
    with pytest.raises(UsageError, match="directory"):
        open_store(f"file://{path}", tpm2=True, backup=True)


def test_missing_folder(tmp_path: Path) -> None:
    store = LinearStore(str(tmp_path / "absent/state.bin"))
    assert store.sizes() == {}
    with pytest.raises(StateMissing):
        store.load("permall")
    for action in (store.lock, lambda: store.store("permall", b"x")):
        with pytest.raises(StorageError, match="No such file") as caught:
            action()
        assert not isinstance(caught.value, StateMissing)


# -- modes, descriptors, lock -------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "wanted", "expected"),
    [(0o022, None, 0o640), (0o077, None, 0o600), (0o077, 0o660, 0o660), (0, 0o600, 0o600)],
)
def test_mode(path: Path, mask: int, wanted: int | None, expected: int) -> None:
    with umask(mask):
        LinearStore(str(path), mode=wanted).store("permall", b"x")
    assert path.stat().st_mode & 0o7777 == expected
    path.chmod(0o644)
    LinearStore(str(path), mode=wanted).load("permall")
    assert path.stat().st_mode & 0o7777 == (0o644 if wanted is None else wanted)


def test_close_gives_up_every_descriptor(path: Path) -> None:
    before = open_descriptors()
    store = LinearStore(str(path))
    store.sizes()
    store.lock()
    store.store("permall", b"x")
    store.sizes()
    (held,) = open_descriptors() - before
    assert not os.get_inheritable(int(held.partition(":")[0]))
    store.close()
    store.close()
    assert open_descriptors() <= before


def locked_by_others(path: Path) -> bool:
    """Asks from another process, for a record lock is its owner's."""

    @in_child
    def check() -> None:
        with open(path, "rb+") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    try:
        check()
    except BaseException:  # pytest.fail
        return True
    return False


def test_lock(store: LinearStore, path: Path) -> None:
    store.lock()
    assert path.stat().st_size == 0, "nothing is written before"
    assert locked_by_others(path)
    store.store("permall", b"x")
    store.delete("permall")
    store.sizes()
    store.lock()
    assert locked_by_others(path), "nothing of this gives it up"
    store.unlock()
    assert not locked_by_others(path)
    store.lock()
    assert locked_by_others(path)
    store.close()
    assert not locked_by_others(path)


def test_lock_of_another_process(path: Path) -> None:
    path.touch()
    with open(path, "rb+") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

        @in_child
        def check() -> None:
            before = open_descriptors()
            with pytest.raises(StateLocked, match="Resource temporarily unavailable"):
                LinearStore(str(path)).lock()
            assert open_descriptors() <= before
            LinearStore(str(path), lock=False).lock()

        check()


# -- what is empty, and what is somebody's -------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 100, 192, 5000, 3 << 20])
def test_zeros_are_an_empty_store(path: Path, size: int) -> None:
    path.write_bytes(bytes(size))
    store = LinearStore(str(path))
    assert store.sizes() == {}
    with pytest.raises(StateMissing):
        store.load("permall")
    assert path.read_bytes() == bytes(size), "looking at it changes nothing"
    store.store("permall", b"x")
    assert LinearStore(str(path)).load("permall") == b"x"


def test_store_that_swtpm_setup_emptied(store: LinearStore, path: Path) -> None:
    store.store("permall", b"old")
    store.close()
    with open(path, "rb+") as file:
        file.write(bytes(8))
    assert store.sizes() == {}
    store.store("permall", b"new")
    assert store.sizes() == {"permall": 3}


@pytest.mark.parametrize(
    "data",
    [
        b"x",
        b"my thesis\n" * 100,
        bytes(1024) + b"\x53\xef" + bytes(9000),  # where an ext4 superblock is
        bytes((64 << 10) + 64) + b"_BHRfS_M" + bytes(9000),
        bytes(4 << 20) + b"EFI PART" + bytes(504),  # the second partition table, at the end
        bytes(7) + b"\1" + bytes(9000),
        MAGIC[:7],
        MAGIC,
        HEAD,
    ],
)
def test_foreign_content_is_refused(path: Path, data: bytes) -> None:
    reason = refused(path, data)
    assert "not a linear TPM store" in reason or "bytes of a header of 192" in reason


def test_symbolic_link_is_refused(path: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    LinearStore(str(target)).store("permall", b"x")
    before = target.read_bytes()
    path.symlink_to(target)
    store = LinearStore(str(path))
    for action in (store.lock, store.sizes, lambda: store.store("permall", b"y")):
        with pytest.raises(StateDamaged, match="is a symbolic link"):
            action()
    assert target.read_bytes() == before


def test_dangling_link_creates_nothing(path: Path, tmp_path: Path) -> None:
    path.symlink_to(tmp_path / "target")
    with pytest.raises(StorageError) as caught:
        LinearStore(str(path)).lock()
    assert not isinstance(caught.value, StateMissing)
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("kind", ["directory", "fifo", "/dev/null", "/dev/zero"])
def test_other_kinds_of_file_are_refused(path: Path, kind: str) -> None:
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    store = LinearStore(kind if kind.startswith("/") else str(path))
    before = open_descriptors()
    for action in (store.lock, store.sizes, lambda: store.store("permall", b"x")):
        with pytest.raises(StorageError):
            action()
    assert open_descriptors() <= before


# -- damage -------------------------------------------------------------------------------


@pytest.mark.parametrize("value", SIZE_FIELDS)
def test_header_size(path: Path, value: int) -> None:
    head = MAGIC + struct.pack("<BBH", 1, 0, value)
    assert refused(path, image([(192, 4, 8)], head=head)) == (
        f"header size is {value} instead of 192"
    )


@pytest.mark.parametrize("version", [2, 255])
def test_version(path: Path, version: int) -> None:
    head = MAGIC + struct.pack("<BBH", version, 0, 192)
    assert refused(path, image([(192, 4, 8)], head=head)) == f"Unknown format version: {version}"


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ([(191, 4, 8)], "the section at 191 overlaps the header"),
        ([(1, 4, 8)], "the section at 1 overlaps the header"),
        ([(192, 4, 2048), (192, 4, 8)], "the section at 192 overlaps the section at 192"),
        ([(1024, 4, 8), (192, 4, 833)], "the section at 1024 overlaps the section at 192"),
        ([(192, 4, 8), *[(0, 0, 0)] * 13, (199, 4, 8)], "the section at 199 overlaps"),
        ([(192, 9, 8)], "the section at 192 has 9 bytes of data in too little room"),
        ([(192, 0xFFFFFFFF, 8)], "the section at 192 has 4294967295 bytes of data in too"),
        ([(192, 8, 0xFFFFFFFF)], "the section at 192 ends at 4294967487, behind the end at 8192"),
        ([(0xFFFFFFFF, 8, 8)], "the section at 4294967295 ends at 4294967303, behind"),
        ([(0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF)], "the section at 4294967295 ends at 8589934590"),
        ([(8192, 1, 1)], "the section at 8192 ends at 8193, behind the end at 8192"),
        ([(8100, 1, 93)], "the section at 8100 ends at 8193, behind the end at 8192"),
    ],
)
def test_sections(path: Path, sections: list[tuple[int, int, int]], reason: str) -> None:
    assert refused(path, image(sections)).startswith(reason)


def test_absurd_size_is_refused_before_it_is_read(path: Path) -> None:
    """A sparse file of 3 GiB that claims a blob of all of it."""
    with open(path, "wb") as file:
        file.write(image([(192, 3 << 30, 3 << 30)], size=192))
        file.truncate(4 << 30)
    with pytest.raises(StateDamaged, match="3221225472 bytes, more than any TPM state"):
        LinearStore(str(path)).load("permall")


def test_older_version_and_unused_slots(path: Path) -> None:
    """Version 0 is accepted, as by the C suite, and so are lengths without an offset."""
    head = MAGIC + struct.pack("<BBH", 0, 0, 192)
    path.write_bytes(image([(192, 4, 8), (0, 7, 9)], head=head))
    store = LinearStore(str(path))
    assert store.load("permall") == b"xxxx"
    assert store.sizes() == {"permall": 4}


def test_other_slots_are_kept(path: Path) -> None:
    """Slots that nobody uses today may be somebody's tomorrow."""
    path.write_bytes(image([(192, 4, 8), *[(0, 0, 0)] * 13, (4096, 100, 200)]))
    store = LinearStore(str(path))
    for size in (3000, 5, 4500):
        store.store("permall", b"p" * size)
    assert slots(path)[14] == (4096, 100, 200)
    assert path.read_bytes()[4096:4296] == b"x" * 200


def test_file_that_shrinks_under_the_store(store: LinearStore, path: Path) -> None:
    store.store("permall", b"x" * 3000)
    os.truncate(path, 5000)
    with pytest.raises(StateDamaged, match="behind the end at 5000"):
        store.load("permall")
