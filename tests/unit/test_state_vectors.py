"""Every state that the C suite wrote reads back to what its libtpms gave it, and is written alike."""

from __future__ import annotations

import hashlib
import json
import shutil
from typing import TYPE_CHECKING, NotRequired, TypedDict

import pytest

from tests.support.files import descriptors_closed
from tests.support.vectors import STATE
from vtpm_cuse.config import KeySource
from vtpm_cuse.storage.base import BLOB_NAMES
from vtpm_cuse.storage.directory import DirectoryStore
from vtpm_cuse.storage.keys import Key, read_key
from vtpm_cuse.storage.linear import LinearStore
from vtpm_cuse.storage.memory import MemoryStore
from vtpm_cuse.storage.sealed import SealedStore

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from vtpm_cuse.storage.base import StateStore


class Vector(TypedDict):
    """A line of payloads.json."""

    file: str
    sha256: str
    key: str | None
    migration: NotRequired[bool]
    migration_key: NotRequired[str | None]
    slot: NotRequired[int]
    passphrase: NotRequired[str]
    kdf: NotRequired[str]


VECTORS: list[Vector] = json.loads((STATE / "payloads.json").read_text())
STORED = [vector for vector in VECTORS if "migration" not in vector]
MIGRATION = [vector for vector in VECTORS if "migration" in vector]
ENCRYPTED = [vector for vector in STORED if vector["key"] and "synthetic" not in vector["file"]]


def name_of(vector: Vector) -> str:
    return vector["file"] + (f":{vector['slot']}" if "slot" in vector else "")


def key_of(text: str | None) -> Key | None:
    return Key(bytes.fromhex(text)) if text else None


def opened(vector: Vector, folder: Path) -> tuple[str, StateStore]:
    """The store that would have the file, and the blob's name in it."""
    path = STATE / vector["file"]
    if "slot" in vector:
        shutil.copy(path, folder)
        return BLOB_NAMES[vector["slot"]], LinearStore(str(folder / path.name))
    # In the folder of the old formats there are several of one name.
    name = path.name[path.name.index("tpm") :]
    shutil.copy(path, folder / name)
    return name.partition(".")[2], DirectoryStore(str(folder), tpm2=name.startswith("tpm2"))


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    with descriptors_closed():
        yield


def digest(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()


def test_none_is_missing() -> None:
    there = {path.relative_to(STATE).as_posix() for path in STATE.glob("*/*")}
    assert {vector["file"] for vector in VECTORS} | {"v1-plain/tpm2-00.permall"} == there
    assert (len(STORED), len(MIGRATION), len(ENCRYPTED)) == (44, 30, 24)


@pytest.mark.parametrize("vector", STORED, ids=name_of)
def test_stored(vector: Vector, tmp_path: Path) -> None:
    name, store = opened(vector, tmp_path)
    payload = SealedStore(store, key_of(vector["key"])).load(name)
    assert digest(payload) == vector["sha256"]
    assert name in store.sizes()


@pytest.mark.parametrize("vector", MIGRATION, ids=name_of)
def test_migration(vector: Vector) -> None:
    data = (STATE / vector["file"]).read_bytes()
    keys = key_of(vector["key"]), key_of(vector["migration_key"])
    payload = SealedStore(MemoryStore(), *keys).from_migration_untrusted("permall", data, 0)
    assert digest(payload) == vector["sha256"]


@pytest.mark.parametrize("vector", [v for v in STORED if "passphrase" in v], ids=name_of)
def test_passphrase(vector: Vector, tmp_path: Path) -> None:
    path = tmp_path / "passphrase"
    path.write_text(vector["passphrase"])
    mode = "aes-256-cbc" if len(str(vector["key"])) == 64 else "aes-128-cbc"
    assert read_key(KeySource(pwdfile=str(path), kdf=vector["kdf"], mode=mode)) == key_of(
        vector["key"]
    )


@pytest.mark.parametrize("vector", ENCRYPTED, ids=name_of)
def test_written_alike(vector: Vector, tmp_path: Path) -> None:
    """With the same IV every byte is the C suite's."""
    name, store = opened(vector, tmp_path)
    blob, key = store.load(name), key_of(vector["key"])
    assert key is not None
    iv = blob[-len(key.secret) :]
    memory = MemoryStore()
    SealedStore(memory, key, random=lambda _: iv).store(name, SealedStore(store, key).load(name))
    assert memory.blobs[name] == blob


@pytest.mark.parametrize(
    "vector", [v for v in STORED if not v["key"] and "synthetic" not in v["file"]], ids=name_of
)
def test_plain_written_alike(vector: Vector, tmp_path: Path) -> None:
    name, store = opened(vector, tmp_path)
    memory = MemoryStore()
    SealedStore(memory).store(name, SealedStore(store).load(name))
    assert memory.blobs[name] == store.load(name)
