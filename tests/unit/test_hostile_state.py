"""Known ways in which state files and blobs lied to their readers, each refused with its check."""

from __future__ import annotations

import hmac
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.vectors import STATE
from vtpm_cuse.errors import BlobError, StateDamaged, StateKeyRejected
from vtpm_cuse.storage.keys import Key
from vtpm_cuse.storage.memory import MemoryStore
from vtpm_cuse.storage.sealed import SealedStore
from vtpm_cuse.wire.blob import BlobTag, find_tlv_untrusted

KEY_128, KEY_256 = Key(bytes(range(16))), Key(bytes(range(32)))
PLAIN = (STATE / "v0.7.1-tpm2-dir-plain/tpm2-00.permall").read_bytes()
SEALED_128 = (STATE / "v0.7.1-tpm2-dir-hex128/tpm2-00.permall").read_bytes()
SEALED_256 = (STATE / "v0.7.1-tpm2-dir-hex256/tpm2-00.permall").read_bytes()
MIGRATION = (STATE / "v0.7.1-tpm2-migr-file128-enc/permanent.blob").read_bytes()
VERSION_1 = (STATE / "synthetic-old-formats/v1-enc128-tpm2-00.permall").read_bytes()
CASES = [(PLAIN, None), (SEALED_128, KEY_128), (SEALED_256, KEY_256)]
cases = pytest.mark.parametrize(("blob", "key"), CASES, ids=["plain", "128", "256"])


def load(blob: bytes, key: Key | None) -> bytes:
    store = MemoryStore()
    store.store("permall", blob)
    return SealedStore(store, key).load("permall")


def damaged(blob: bytes, key: Key | None) -> int:
    try:
        load(blob, key)
    except (StateDamaged, StateKeyRejected) as exc:
        return exc.result
    pytest.fail("a damaged state was loaded")


def around(size: int) -> list[int]:
    return [0, size - 1, size + 1, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF]


@cases
def test_header_size(blob: bytes, key: Key | None) -> None:
    for value in (0, 9, 11, 0xFFFF):
        assert damaged(blob[:2] + struct.pack(">H", value) + blob[4:], key) == 0x2B


@cases
def test_total_size(blob: bytes, key: Key | None) -> None:
    for value in around(len(blob)):
        assert damaged(blob[:6] + struct.pack(">I", value) + blob[10:], key) == 3


@cases
def test_element_size(blob: bytes, key: Key | None) -> None:
    """The first element's; then those behind it are looked for in the wrong place."""
    size = struct.unpack_from(">I", blob, 12)[0]
    for value in around(size):
        changed = blob[:12] + struct.pack(">I", value) + blob[16:]
        if key is None and value < size:
            assert load(changed, None) == blob[16 : 16 + value], "the rest is an unknown element"
        else:
            assert damaged(changed, key) == 9


@cases
def test_every_length(blob: bytes, key: Key | None) -> None:
    """Cut anywhere, with a header that agrees."""
    for size in [*range(40), *range(len(blob) - 80, len(blob))]:
        cut = blob[:6] + struct.pack(">I", size) + blob[10:size]
        if size < 10:
            assert damaged(blob[:size], key) == 3
        elif key is not None and size == len(blob) - 6 - len(key.secret):
            assert damaged(cut, key) == 0x21, "just without its IV: the HMAC covers that"
        else:
            assert damaged(cut, key) in {3, 9, 0x21}


@pytest.mark.parametrize(("blob", "key"), CASES[1:], ids=["128", "256"])
def test_every_bit_of_what_is_authentic(blob: bytes, key: Key) -> None:
    for at in range(16, len(blob)):
        changed = bytearray(blob)
        changed[at] ^= 1 << at % 8
        assert damaged(bytes(changed), key) in {9, 0x21}


def test_hmac_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[int, int]] = []
    real = hmac.compare_digest

    def spy(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return real(one, other)

    monkeypatch.setattr(hmac, "compare_digest", spy)
    load(SEALED_128, KEY_128)
    load(VERSION_1, KEY_128)
    damaged(SEALED_128, Key(bytes(16)))
    assert compared == [(32, 32)] * 3


def test_nothing_is_decrypted_before_the_hmac_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> bytes:
        pytest.fail("decrypted")

    monkeypatch.setattr(Key, "_decrypt", never)
    assert damaged(SEALED_128[:40] + bytes(1) + SEALED_128[41:], KEY_128) == 0x21


@pytest.mark.parametrize("size", range(17))
@pytest.mark.parametrize(
    "start",
    [
        bytes(16),
        b"\xff" * 16,
        MIGRATION[:16],
        PLAIN[:16],
    ],
    ids=["zeros", "ones", "migration blob", "state file"],
)
def test_incoming_blob_of_a_few_bytes(size: int, start: bytes) -> None:
    """With the header's own length, and with one that agrees."""
    store = SealedStore(MemoryStore(), KEY_128, KEY_128)
    blob = start[:size]
    for data in {blob, blob[:6] + struct.pack(">I", size)[: max(0, size - 6)] + blob[10:]}:
        for flags in (0, 1, 2, 3, 0xFFFFFFFF):
            result = 0
            try:
                payload = store.from_migration_untrusted("permall", data, flags)
            except BlobError as exc:
                result = exc.result
            assert result in {0, 3, 9, 0xD, 0x21, 0x2B, 0x2E}
            if result == 0:
                assert (payload, len(data)) == (b"", 10), "a bare header stands for no state"


@given(st.binary(max_size=60), st.integers(0, 5), st.sampled_from([None, KEY_128, KEY_256]))
def test_any_change_of_a_migration_blob(junk: bytes, place: int, key: Key | None) -> None:
    at = place * len(MIGRATION) // 6
    blob = MIGRATION[:at] + junk + MIGRATION[at + len(junk) :]
    blob = blob[:6] + struct.pack(">I", len(blob)) + blob[10:]
    store = SealedStore(MemoryStore(), key, key)
    refused = False
    try:
        payload = store.from_migration_untrusted("permall", blob, 0)
    except BlobError:
        refused = True
    if not refused and key == KEY_128 and payload:
        genuine = SealedStore(MemoryStore(), KEY_128).from_migration_untrusted
        assert payload in {genuine("permall", MIGRATION, 0), blob[16:]}


def elements() -> st.SearchStrategy[bytes]:
    """Elements with lengths that may lie."""
    lying = st.one_of(st.integers(0, 40), st.sampled_from([0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF]))

    def element(tag: int, length: int, value: bytes) -> bytes:
        return struct.pack(">HI", tag, length) + value

    return st.lists(st.builds(element, st.integers(0, 8), lying, st.binary(max_size=40))).map(
        b"".join
    )


@given(elements(), st.sampled_from(list(BlobTag)))
def test_any_elements(stream: bytes, tag: BlobTag) -> None:
    value = find_tlv_untrusted(stream, tag)
    assert value is None or struct.pack(">HI", tag, len(value)) + value in stream


@given(elements(), st.integers(0, 0xFFFF), st.integers(0, 3), st.integers(0, 3))
def test_any_state_file_of_elements(body: bytes, flags: int, version: int, least: int) -> None:
    blob = struct.pack(">BBHHI", version, least, 10, flags, 10 + len(body)) + body
    for key in (KEY_128, KEY_256):
        damaged(blob, key)
