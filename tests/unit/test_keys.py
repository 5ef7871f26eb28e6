"""Encrypted blobs and key sources, against samples computed by an independent implementation."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import random
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st

from vtpm_cuse.config import KeySource
from vtpm_cuse.errors import BlobError, StateDamaged, StateKeyRejected, UsageError
from vtpm_cuse.storage.keys import Key, read_key
from vtpm_cuse.storage.memory import MemoryStore
from vtpm_cuse.storage.sealed import SealedStore
from vtpm_cuse.wire.blob import (
    BlobFlag,
    BlobHeader,
    BlobTag,
    find_tlv_untrusted,
    split_header_untrusted,
    tlv,
    with_header,
)
from vtpm_cuse.wire.layout import BIG
from vtpm_cuse.wire.ptm import PtmResult, PtmStateFlag

if TYPE_CHECKING:
    from pathlib import Path

KEY_128 = Key(bytes(range(16)))
KEY_256 = Key(bytes(range(32)))
MIGRATION = Key(bytes(range(0xF0, 0x100)))

FILE_128 = bytes.fromhex(
    "0201000a00010000005c000200000010200ec822a88758e1df11bff5ff6eb53500030000002021b553b0e79678df"
    "50ea73299c48412298a74d8120c7ba0b17e88b325cec8bd4000600000010404142434445464748494a4b4c4d4e4f"
)
FILE_256 = bytes.fromhex(
    "0201000a00090000007c0002000000201e638d355921e8ebd7cee5c26dd7fadb1ff76fedc6fc777856e6075fa723"
    "45530003000000207d6d6baac4e691fee0e4f57bc7ed649517f14ff09b4d605076bc40e3605d9fe5000600000020"
    "404142434445464748494a4b4c4d4e4f505152535455565758595a5b5c5d5e5f"
)
VERSION_1_128 = bytes.fromhex(
    "0101000a00010000003ae54b3ce3f4f7fad3435bd63504f6d098c4b3c7a7717cb789fd4132f9c341dd6be1fd1006"
    "45b5384d1d537786276e64bc"
)
MIGRATION_BOTH = bytes.fromhex(
    "0201000a0007000000ac0005000000601e7b5ba7bbca3294dce6278190eb5ab6592f7c8609dd77795656a986ec0d"
    "29deff120269e03dd96dff3a1f7be4fd5b13c0cad91e388aca57d15d15a886fcd34bb909538e69866de93fc71b7d"
    "cf8f8b202081c209ff4ce82dc073d4849ab0b7a100030000002083825fe59de1c3cdc3fd93ecc7d019ee7afbb920"
    "04726df447c32d69b2cd3282000700000010404142434445464748494a4b4c4d4e4f"
)


def store(key: Key | None = None, migration_key: Key | None = None) -> SealedStore:
    return SealedStore(MemoryStore(), key, migration_key, lambda n: bytes(range(0x40, 0x40 + n)))


def load(blob: bytes, key: Key | None) -> bytes:
    sealed = store(key)
    sealed.blobs.store("permall", blob)
    return sealed.load("permall")


@pytest.mark.parametrize(("key", "blob"), [(KEY_128, FILE_128), (KEY_256, FILE_256)])
def test_files_are_the_samples_and_back(key: Key, blob: bytes) -> None:
    sealed = store(key)
    sealed.store("permall", b"hello")
    assert sealed.blobs.load("permall") == blob
    assert load(blob, key) == b"hello"


def test_migration_blob_with_both_keys() -> None:
    sealed = store(KEY_128, MIGRATION)
    flag, blob = sealed.to_migration(b"hello", decrypted=False)
    assert (flag, blob) == (PtmStateFlag.PTM_STATE_FLAG_ENCRYPTED, MIGRATION_BOTH)
    assert sealed.from_migration_untrusted("permall", MIGRATION_BOTH, 0) == b"hello"


def test_old_format() -> None:
    assert load(VERSION_1_128, KEY_128) == b"hello"


@pytest.mark.parametrize(
    ("blob", "key", "kind", "result"),
    [
        (FILE_128, None, StateKeyRejected, PtmResult.TPM_FAIL),
        (FILE_128, KEY_256, StateKeyRejected, PtmResult.TPM_BAD_KEY_PROPERTY),
        (FILE_256, KEY_128, StateKeyRejected, PtmResult.TPM_BAD_KEY_PROPERTY),
        (FILE_128, MIGRATION, StateKeyRejected, PtmResult.TPM_DECRYPT_ERROR),
        (FILE_128[:-1] + b"\0", KEY_128, StateKeyRejected, PtmResult.TPM_DECRYPT_ERROR),
        (VERSION_1_128, MIGRATION, StateKeyRejected, PtmResult.TPM_DECRYPT_ERROR),
    ],
)
def test_what_does_not_open(
    blob: bytes, key: Key | None, kind: type[StateDamaged], result: PtmResult
) -> None:
    with pytest.raises(kind) as raised:
        load(blob, key)
    assert raised.value.result == result


def padded(key: Key, plain: bytes) -> bytes:
    """A version 1 blob, encrypted as it is: *plain* has its padding, good or bad."""
    encryptor = Cipher(algorithms.AES(key.secret), modes.CBC(bytes(16))).encryptor()
    body = encryptor.update(plain) + encryptor.finalize()
    return BlobHeader(1, 1, 10, BlobFlag.ENCRYPTED, 10 + len(body)).pack(BIG) + body


def authentic(key: Key, plain: bytes) -> bytes:
    """A version 2 blob, sealed with *plain*, which has its padding, good or bad."""
    iv = bytes(len(key.secret))
    encryptor = Cipher(algorithms.AES(key.secret), modes.CBC(iv[:16])).encryptor()
    ciphertext = encryptor.update(plain) + encryptor.finalize()
    digest = hmac.digest(key.secret, ciphertext + iv, "sha256")
    flags = BlobFlag.ENCRYPTED | (BlobFlag.KEY_256BIT if key.is_256bit else BlobFlag(0))
    elements = (
        (BlobTag.ENCRYPTED_DATA, ciphertext),
        (BlobTag.HMAC, digest),
        (BlobTag.IV_DATA, iv),
    )
    return with_header(flags, b"".join(tlv(tag, value) for tag, value in elements))


@pytest.mark.parametrize("key", [KEY_128, KEY_256], ids=["128", "256"])
def test_padding_is_looked_at_whole(key: Key) -> None:
    """One to a key's length of bytes that all say how many they are."""
    size = len(key.secret)
    for pad in range(1, size + 1):
        data = bytes(range(100, 100 + 2 * size - pad))
        good = data + bytes([pad]) * pad
        assert load(authentic(key, good), key) == data
        for place in range(1, pad + 1):
            bad = bytearray(good)
            bad[-place] ^= 0x80
            with pytest.raises(StateKeyRejected, match="padding of the decrypted data is bad"):
                load(authentic(key, bytes(bad)), key)
    for pad in (0, size + 1, 0xFF):
        with pytest.raises(StateKeyRejected, match="padding of the decrypted data is bad"):
            load(authentic(key, bytes(3 * size - 1) + bytes([pad])), key)
        with pytest.raises(StateKeyRejected, match="padding of the decrypted data is bad"):
            load(authentic(key, bytes([pad]) * (9 * size)), key)


def test_both_errors_of_the_oldest_form_look_the_same() -> None:
    """Who could tell padding from checksum could decrypt, by trying often."""
    data = bytes(16)
    plain = hashlib.sha256(data).digest() + data
    good = padded(KEY_128, plain + bytes([16]) * 16)
    assert load(good, KEY_128) == data
    bad_padding = padded(KEY_128, plain + bytes(16))
    bad_checksum = padded(KEY_128, b"x" + plain[1:] + bytes([16]) * 16)
    said = set()
    for blob in (bad_padding, bad_checksum, good[:-1] + b"\0"):
        with pytest.raises(StateKeyRejected) as raised:
            load(blob, KEY_128)
        said.add((str(raised.value), raised.value.result))
    assert len(said) == 1


def test_the_oldest_form_encrypted_needs_a_key() -> None:
    with pytest.raises(StateKeyRejected):
        load(VERSION_1_128, None)


# -- blobs without an IV --------------------------------------------------------------------

STATE_OF_A_TPM = bytes.fromhex("0003ab3647230003") + bytes(range(200))


def without_iv(key: Key, payload: bytes) -> bytes:
    """As programs wrote it that knew no IV."""
    size = len(key.secret)
    pad = size - len(payload) % size
    encryptor = Cipher(algorithms.AES(key.secret), modes.CBC(bytes(16))).encryptor()
    ciphertext = encryptor.update(payload + bytes([pad]) * pad) + encryptor.finalize()
    digest = hmac.digest(key.secret, ciphertext, "sha256")
    flags = BlobFlag.ENCRYPTED | (BlobFlag.KEY_256BIT if key.is_256bit else BlobFlag(0))
    body = tlv(BlobTag.ENCRYPTED_DATA, ciphertext) + tlv(BlobTag.HMAC, digest)
    return with_header(flags, body)


def forged(blob: bytes, *more: bytes) -> bytes:
    """The IV of *blob* is put behind its ciphertext: the HMAC fits, and nobody needs the key."""
    header, body = split_header_untrusted(blob)
    found = [
        find_tlv_untrusted(body, tag)
        for tag in (BlobTag.ENCRYPTED_DATA, BlobTag.IV_DATA, BlobTag.HMAC)
    ]
    ciphertext, iv, digest = (value or b"" for value in found)
    elements = tlv(BlobTag.ENCRYPTED_DATA, ciphertext + iv) + tlv(BlobTag.HMAC, digest)
    return with_header(BlobFlag(header.flags), elements + b"".join(more))


@pytest.mark.parametrize("key", [KEY_128, KEY_256], ids=["128", "256"])
def test_blob_without_iv_is_read_and_a_forged_one_is_not(key: Key) -> None:
    assert load(without_iv(key, STATE_OF_A_TPM), key) == STATE_OF_A_TPM
    chance = random.Random(19)  # noqa: S311 - repeatable, not secret
    sealed = SealedStore(MemoryStore(), key, None, chance.randbytes)
    fitted = 0
    for _ in range(3000):
        sealed.store("permall", STATE_OF_A_TPM)
        blob = forged(sealed.blobs.load("permall"))
        with pytest.raises(StateKeyRejected) as raised:
            load(blob, key)
        fitted += "is no state of a TPM" in str(raised.value)
    assert fitted, "the padding fitted never, so that nothing was tried"


def test_other_elements_beside_a_missing_iv_are_refused() -> None:
    """Such as an IV under another tag."""
    good = without_iv(KEY_128, STATE_OF_A_TPM)
    header, body = split_header_untrusted(good)
    for more in (b"x", tlv(BlobTag.IV_MIGRATION_DATA, bytes(16)), tlv(BlobTag.HMAC, bytes(32))):
        blob = with_header(BlobFlag(header.flags), body + more)
        with pytest.raises(StateKeyRejected, match="no IV"):
            load(blob, KEY_128)


@pytest.mark.parametrize(
    ("key", "migration_key", "result"),
    [
        (KEY_128, None, PtmResult.TPM_KEYNOTFOUND),
        (None, MIGRATION, PtmResult.TPM_KEYNOTFOUND),
        (KEY_128, KEY_128, PtmResult.TPM_DECRYPT_ERROR),
        (KEY_128, KEY_256, PtmResult.TPM_BAD_KEY_PROPERTY),
    ],
)
def test_migration_blob_for_somebody_else(
    key: Key | None, migration_key: Key | None, result: PtmResult
) -> None:
    with pytest.raises(BlobError) as raised:
        store(key, migration_key).from_migration_untrusted("permall", MIGRATION_BOTH, 0)
    assert raised.value.result == result


def test_a_plain_migration_blob_is_taken_whatever_the_keys() -> None:
    """As by the C suite: the keys say what is made, and not what is to be believed."""
    _, plain = store().to_migration(b"somebody's TPM", decrypted=False)
    found = store(KEY_128, MIGRATION).from_migration_untrusted("permall", plain, 0)
    assert found == b"somebody's TPM"


KEYS = [None, KEY_128, KEY_256]


@given(st.binary(max_size=100), st.sampled_from(KEYS), st.sampled_from(KEYS), st.booleans())
def test_what_goes_in_comes_out(
    payload: bytes, key: Key | None, migration_key: Key | None, decrypted: bool
) -> None:
    """PEER: fails with keys of different sizes."""
    sealed = SealedStore(MemoryStore(), key, migration_key)
    sealed.store("permall", payload)
    assert sealed.load("permall") == payload
    _, blob = sealed.to_migration(payload, decrypted=decrypted)
    assert sealed.from_migration_untrusted("permall", blob, 0) == payload


@given(st.integers(0, len(FILE_128) - 1), st.integers(1, 255))
def test_a_changed_byte_changes_no_payload(place: int, change: int) -> None:
    """Header flags are not authenticated and may pass; a wrong payload never comes out."""
    damaged = bytearray(FILE_128)
    damaged[place] ^= change
    try:
        payload = load(bytes(damaged), KEY_128)
    except (StateDamaged, StateKeyRejected):
        return
    assert payload == b"hello"


@pytest.mark.parametrize(
    ("text", "mode", "key"),
    [
        (b"00112233445566778899aabbccddeeff", "aes-cbc", "00112233445566778899aabbccddeeff"),
        (
            b"0x00112233445566778899AABBCCDDEEFF\n",
            "aes-128-cbc",
            "00112233445566778899aabbccddeeff",
        ),
        (b"11" * 32 + b"\0rest", "aes-256-cbc", "11" * 32),
        (b"22" * 16 + b" words", "aes-128-cbc", "22" * 16),
    ],
)
def test_hex_keys(tmp_path: Path, text: bytes, mode: str, key: str) -> None:
    path = tmp_path / "key"
    path.write_bytes(text)
    assert read_key(KeySource(file=str(path), mode=mode)).secret.hex() == key


@pytest.mark.parametrize(
    ("text", "mode", "reason"),
    [
        (b"", "aes-cbc", "Could not parse key hex string into 16 byte buffer."),
        (b"\n" + b"11" * 16, "aes-cbc", "Could not parse key hex string into 16 byte buffer."),
        (b"1" * 31, "aes-cbc", "Could not parse key hex string into 16 byte buffer."),
        (b"0X" + b"11" * 16, "aes-cbc", "Could not parse key hex string into 16 byte buffer."),
        (b"11" * 17, "aes-cbc", "Could not parse key hex string into 16 byte buffer."),
        (b"1" * 30, "aes-cbc", "Unsupported key length with 30 digits."),
        (b"11" * 16, "aes-256-cbc", "The provided key is too short. Got 16 bytes, need 32."),
    ],
)
def test_bad_hex_keys(tmp_path: Path, text: bytes, mode: str, reason: str) -> None:
    path = tmp_path / "key"
    path.write_bytes(text)
    with pytest.raises(UsageError) as raised:
        read_key(KeySource(file=str(path), mode=mode))
    assert str(raised.value) == reason


@pytest.mark.parametrize(
    ("kdf", "mode", "key"),
    [
        ("pbkdf2", "aes-128-cbc", "91b5acb48c033c4853b07407e773d9cd"),
        (
            "pbkdf2",
            "aes-256-cbc",
            "91b5acb48c033c4853b07407e773d9cd276a278442e2de1dd827b60c16902ee6",
        ),
        ("sha512", "aes-128-cbc", "be5ef7679d88ab9a9045f6267e55f5e5"),
        (
            "sha512",
            "aes-256-cbc",
            "be5ef7679d88ab9a9045f6267e55f5e5784b4b8cd764b5cd855a5244f91c6269",
        ),
    ],
)
def test_passphrases(tmp_path: Path, kdf: str, mode: str, key: str) -> None:
    path = tmp_path / "passphrase"
    path.write_bytes(b"correct horse battery staple")
    source = KeySource(pwdfile=str(path), kdf=kdf, mode=mode, remove=True)
    assert read_key(source).secret.hex() == key
    assert not path.exists()


@pytest.mark.parametrize(("length", "warned"), [(0, True), (6, True), (7, False)])
def test_a_short_passphrase_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, length: int, *, warned: bool
) -> None:
    path = tmp_path / "passphrase"
    path.write_bytes(b"secret!"[:length])
    with caplog.at_level(logging.WARNING):
        read_key(KeySource(pwdfile=str(path)))
    expected = [f"Warning: Passphrase is only {length} bytes long"]
    assert caplog.messages == (expected if warned else [])


def test_a_pipe_may_deliver_in_pieces() -> None:
    read_end, write_end = os.pipe()
    os.write(write_end, b"00112233445566778")
    os.write(write_end, b"899aabbccddeeff")
    os.close(write_end)
    key = read_key(KeySource(fd=read_end))
    assert key.secret.hex() == "00112233445566778899aabbccddeeff"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(read_end)


def test_the_key_is_not_shown() -> None:
    assert KEY_128.secret.hex() not in repr(KEY_128)
    assert repr(KEY_128) == "Key()"


def test_no_source_and_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is required for key option"):
        read_key(KeySource())
    with pytest.raises(UsageError, match=r"Unable to open file .*/none: No such file"):
        read_key(KeySource(file=str(tmp_path / "none")))
