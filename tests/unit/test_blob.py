"""State blobs: the C suite's bytes, and every check with its result code."""

import hashlib

import pytest

from tests.support.vectors import MIGRATION_PAYLOADS, PAYLOADS, STATE
from vtpm_cuse.errors import BlobError, StateDamaged, StateKeyRejected, StateMissing
from vtpm_cuse.storage.memory import MemoryStore
from vtpm_cuse.storage.sealed import SealedStore
from vtpm_cuse.wire.blob import (
    BlobFlag,
    BlobTag,
    find_tlv_untrusted,
    split_header_untrusted,
    tlv,
    with_header,
)

PLAIN = bytes.fromhex("0201000a00000000001500010000000568656c6c6f")
MIGRATION = bytes.fromhex("0201000a00040000001b00040000000b00010000000568656c6c6f")
ENCRYPTED = bytes.fromhex(
    "0201000a00010000005c000200000010200ec822a88758e1df11bff5ff6eb53500030000002021b553b0e79678df"
    "50ea73299c48412298a74d8120c7ba0b17e88b325cec8bd4000600000010404142434445464748494a4b4c4d4e4f"
)
BOTH_KEYS = bytes.fromhex(
    "0201000a0007000000ac0005000000601e7b5ba7bbca3294dce6278190eb5ab6592f7c8609dd77795656a986ec0d"
    "29deff120269e03dd96dff3a1f7be4fd5b13c0cad91e388aca57d15d15a886fcd34bb909538e69866de93fc71b7d"
    "cf8f8b202081c209ff4ce82dc073d4849ab0b7a100030000002083825fe59de1c3cdc3fd93ecc7d019ee7afbb920"
    "04726df447c32d69b2cd3282000700000010404142434445464748494a4b4c4d4e4f"
)


def sealed_with(blob: bytes) -> SealedStore:
    store = MemoryStore()
    store.blobs["permall"] = blob
    return SealedStore(store)


# -- the header ---------------------------------------------------------------------------


def test_header_is_read() -> None:
    header, body = split_header_untrusted(PLAIN)
    assert (header.version, header.min_version, header.header_size) == (2, 1, 10)
    assert (header.flags, header.total_size) == (0, 21)
    assert body == PLAIN[10:]


def test_header_is_written() -> None:
    assert with_header(BlobFlag(0), tlv(BlobTag.DATA, b"hello")) == PLAIN


@pytest.mark.parametrize(
    ("blob", "result"),
    [
        (b"", 0x03),
        (PLAIN[:9], 0x03),
        (PLAIN[:-1], 0x03),
        (PLAIN + b"\0", 0x03),
        (b"\x02\x03" + PLAIN[2:], 0x2E),
        (b"\x02\x01\x00\x0b" + PLAIN[4:], 0x2B),
        (b"\x03" + PLAIN[1:], 0x09),
        (b"\x00" + PLAIN[1:], 0x09),
        # The order of the checks: total length, minimum version, header size, version.
        (b"\x03\x03\x00\x0b" + PLAIN[4:] + b"\0", 0x03),
        (b"\x03\x03\x00\x0b" + PLAIN[4:], 0x2E),
        (b"\x03\x01\x00\x0b" + PLAIN[4:], 0x2B),
    ],
)
def test_header_checks(blob: bytes, result: int) -> None:
    with pytest.raises(BlobError) as caught:
        split_header_untrusted(blob)
    assert caught.value.result == result
    assert caught.value.reason


# -- elements -----------------------------------------------------------------------------


def test_first_match_wins_and_unknown_tags_are_skipped() -> None:
    stream = bytes.fromhex("00630000000163" + "00010000000161" + "00010000000162")
    assert find_tlv_untrusted(stream, BlobTag.DATA) == b"a"


@pytest.mark.parametrize(
    "stream",
    [
        "",
        "0001",
        "00010000000161"[:-2],  # overruns the end
        "0001ffffffff61",
        "00630000000261" + "00010000000161",  # an unknown one swallows the next, and misses it
    ],
)
def test_absent_element(stream: str) -> None:
    assert find_tlv_untrusted(bytes.fromhex(stream), BlobTag.DATA) is None


def test_empty_element_is_there() -> None:
    assert find_tlv_untrusted(bytes.fromhex("000100000000"), BlobTag.DATA) == b""


# -- state files --------------------------------------------------------------------------


def test_store_writes_the_c_suites_bytes() -> None:
    store = MemoryStore()
    SealedStore(store).store("permall", b"hello")
    assert store.blobs == {"permall": PLAIN}


@pytest.mark.parametrize("name", PAYLOADS)
def test_state_file_is_read(name: str) -> None:
    payload = sealed_with((STATE / name).read_bytes()).load("permall")
    assert hashlib.sha256(payload).hexdigest() == PAYLOADS[name]


@pytest.mark.parametrize("name", [name for name in PAYLOADS if not name.startswith("v1")])
def test_state_file_is_rewritten_byte_for_byte(name: str) -> None:
    original = (STATE / name).read_bytes()
    store = sealed_with(original)
    store.store("copy", store.load("permall"))
    assert store.blobs.load("copy") == original


def test_version_1_is_rewritten_as_version_2() -> None:
    store = sealed_with((STATE / "v1-plain/tpm2-00.permall").read_bytes())
    store.store("copy", store.load("permall"))
    assert store.blobs.load("copy")[:10].hex() == "0201000a000000000523"


def test_flag_alone_does_not_make_it_encrypted() -> None:
    assert sealed_with(PLAIN[:5] + b"\x01" + PLAIN[6:]).load("permall") == b"hello"


@pytest.mark.parametrize("blob", [b"", PLAIN[:-1], PLAIN + b"x"])
def test_damage_is_damage_and_never_absence(blob: bytes) -> None:
    with pytest.raises(StateDamaged) as caught:
        sealed_with(blob).load("permall")
    assert (caught.value.path, caught.value.result) == ("permall", 3)


def test_a_missing_key_is_neither_damage_nor_absence() -> None:
    with pytest.raises(StateKeyRejected) as caught:
        sealed_with(ENCRYPTED).load("permall")
    assert (caught.value.path, caught.value.result) == ("permall", 9)


def test_absence_is_absence() -> None:
    with pytest.raises(StateMissing):
        SealedStore(MemoryStore()).load("permall")


# -- migration blobs ----------------------------------------------------------------------


def test_migration_blob_is_written() -> None:
    assert SealedStore(MemoryStore()).to_migration(b"hello", decrypted=False) == (0, MIGRATION)


@pytest.mark.parametrize("name", MIGRATION_PAYLOADS)
def test_migration_blob_of_the_c_suite(name: str) -> None:
    original = (STATE / name).read_bytes()
    store = SealedStore(MemoryStore())
    payload = store.from_migration_untrusted("permall", original, 0)
    assert hashlib.sha256(payload).hexdigest() == MIGRATION_PAYLOADS[name]
    assert store.to_migration(payload, decrypted=True) == (0, original)


@pytest.mark.parametrize(
    ("blob", "flags", "result"),
    [
        (BOTH_KEYS, 0, 0x0D),
        (ENCRYPTED, 0, 0x0D),
        (MIGRATION, 2, 0x0D),
        (MIGRATION[:9], 0, 0x03),
        (MIGRATION[:-1], 0, 0x03),
        (PLAIN, 0, 0x09),  # a state file is no migration blob
        (with_header(BlobFlag.MIGRATION_DATA, tlv(BlobTag.MIGRATION_DATA, b"")), 0, 0x09),
    ],
)
def test_migration_blob_refused(blob: bytes, flags: int, result: int) -> None:
    with pytest.raises(BlobError) as caught:
        SealedStore(MemoryStore()).from_migration_untrusted("permall", blob, flags)
    assert caught.value.result == result


def test_version_1_migration_blob() -> None:
    blob = bytes.fromhex("0101000a00040000000f") + b"hello"
    assert SealedStore(MemoryStore()).from_migration_untrusted("permall", blob, 0) == b"hello"
