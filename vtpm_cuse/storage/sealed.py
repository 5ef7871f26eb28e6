"""Payloads in, payloads out: header, TLV layer and keys around any store; migration blobs."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vtpm_cuse.errors import BlobError, StateDamaged, StateKeyRejected
from vtpm_cuse.storage.reserve import Reserve
from vtpm_cuse.wire.blob import (
    BlobFlag,
    BlobTag,
    find_tlv_untrusted,
    is_payload,
    split_header_untrusted,
    tlv,
    with_header,
)
from vtpm_cuse.wire.ptm import PtmConfigFlag, PtmResult, PtmStateFlag

if TYPE_CHECKING:
    from collections.abc import Callable

    from vtpm_cuse.storage.base import StateStore
    from vtpm_cuse.storage.keys import Key

_KEY_RESULTS = (
    PtmResult.TPM_DECRYPT_ERROR,
    PtmResult.TPM_BAD_KEY_PROPERTY,
    PtmResult.TPM_KEYNOTFOUND,
)


class SealedStore:
    """A store of payloads (implements `engine.base.Nvram`) on a store of blobs.

    Args:
        blobs: Keeps the blobs.
        key: Encrypts what is stored.
        migration_key: Encrypts what goes to another TPM.
        random: Makes IVs.
        reserve: Where the process may run out of descriptors.

    Attributes:
        last_loaded: The blob that was handed out last: the one at fault when libtpms then refuses
            to start, for it looks at each before it asks for the next.
    """

    def __init__(
        self,
        blobs: StateStore,
        key: Key | None = None,
        migration_key: Key | None = None,
        random: Callable[[int], bytes] = os.urandom,
        reserve: Reserve | None = None,
    ) -> None:
        self.blobs = blobs
        self.last_loaded = ""
        self._key = key
        self._migration_key = migration_key
        self._random = random
        self._reserve = reserve or Reserve(0)

    @property
    def config_flags(self) -> PtmConfigFlag:
        """Which keys are in use."""
        flags = PtmConfigFlag(0)
        if self._key is not None:
            flags |= PtmConfigFlag.PTM_CONFIG_FLAG_FILE_KEY
        if self._migration_key is not None:
            flags |= PtmConfigFlag.PTM_CONFIG_FLAG_MIGRATION_KEY
        return flags

    # -- stored state ---------------------------------------------------------------------

    def load(self, name: str) -> bytes:
        """Returns the payload. Raises StateMissing, StateKeyRejected, StateDamaged, StorageError.

        Whether a key is there decides what is expected, not the header's flag: a
        plain file where a key is given is an error.
        """
        blob = self._reserve.help(lambda: self.blobs.load(name))
        body = b""
        try:
            header, body = split_header_untrusted(blob)
            payload = self._open_inner(
                name, body, BlobFlag(header.flags), self._key, header.version
            )
        except BlobError as exc:
            keys_fault = exc.result in _KEY_RESULTS or _is_other_way(body, self._key)
            kind = StateKeyRejected if keys_fault else StateDamaged
            raise kind(self.blobs.where(name), exc.reason, exc.result) from exc
        self.last_loaded = name
        return payload

    def store(self, name: str, data: bytes) -> None:
        """Keeps the payload, durably. Raises StorageError."""
        flags, body = self._seal_inner(data, self._key)
        self._reserve.help(lambda: self.blobs.store(name, with_header(flags, body)))

    def delete(self, name: str, *, must_exist: bool) -> None:
        """Removes the blob. Raises StorageError."""
        self.blobs.delete(name, must_exist=must_exist)

    # -- migration ------------------------------------------------------------------------

    def to_migration(self, payload: bytes, *, decrypted: bool) -> tuple[PtmStateFlag, bytes]:
        """Wraps a payload for another TPM; the flag says whether the file key still covers it."""
        flags, inner = self._seal_inner(payload, None if decrypted else self._key)
        state_flag = PtmStateFlag(0)
        if flags & BlobFlag.ENCRYPTED:
            state_flag = PtmStateFlag.PTM_STATE_FLAG_ENCRYPTED
        flags |= BlobFlag.MIGRATION_DATA
        key = self._migration_key
        if key is None:
            return state_flag, with_header(flags, tlv(BlobTag.MIGRATION_DATA, inner))
        flags |= BlobFlag.MIGRATION_ENCRYPTED
        if key.is_256bit:
            flags |= BlobFlag.MIGRATION_KEY_256BIT
        tags = BlobTag.ENCRYPTED_MIGRATION_DATA, BlobTag.IV_MIGRATION_DATA
        return state_flag, with_header(flags, key.seal(*tags, inner, self._random))

    def from_migration_untrusted(self, name: str, blob: bytes, request_flags: int) -> bytes:
        """Unwraps what `to_migration` or the C suite made; empty for a bare header.

        Raises:
            BlobError: With the C suite's result code.
        """
        header, body = split_header_untrusted(blob)
        if not body:
            return b""
        flags = BlobFlag(header.flags)
        try:
            key = None
            wanted = request_flags & PtmStateFlag.PTM_STATE_FLAG_ENCRYPTED
            if flags & BlobFlag.ENCRYPTED or wanted:
                key = _need(self._key, "state", name)
            inner = self._open_outer(name, body, flags, header.version)
            return self._open_inner(name, inner, flags, key, header.version)
        except BlobError as exc:
            raise BlobError(exc.result, f"{name}: {exc.reason}") from exc

    def _open_outer(self, name: str, body: bytes, flags: BlobFlag, version: int) -> bytes:
        if flags & BlobFlag.MIGRATION_ENCRYPTED:
            key = _need(self._migration_key, "migration", name)
            if version == 1:
                return key.unseal_version_1_untrusted(body)
            _check_size(key, flags & BlobFlag.MIGRATION_KEY_256BIT)
            tags = BlobTag.ENCRYPTED_MIGRATION_DATA, BlobTag.IV_MIGRATION_DATA
            return key.unseal_untrusted(*tags, body)
        if version == 1:
            return body
        inner = find_tlv_untrusted(body, BlobTag.MIGRATION_DATA)
        if inner is None:
            raise BlobError(PtmResult.TPM_FAIL, "Could not find migration data in byte stream.")
        return inner

    # -- the layer both share -------------------------------------------------------------

    def _seal_inner(self, payload: bytes, key: Key | None) -> tuple[BlobFlag, bytes]:
        if key is None:
            return BlobFlag(0), tlv(BlobTag.DATA, payload)
        flags = BlobFlag.ENCRYPTED | (BlobFlag.KEY_256BIT if key.is_256bit else BlobFlag(0))
        tags = BlobTag.ENCRYPTED_DATA, BlobTag.IV_DATA
        return flags, key.seal(*tags, payload, self._random)

    @staticmethod
    def _open_inner(
        name: str, stream: bytes, flags: BlobFlag, key: Key | None, version: int
    ) -> bytes:
        if version == 1:
            if key is not None:
                return key.unseal_version_1_untrusted(stream)
            if flags & BlobFlag.ENCRYPTED:  # PEER: gives libtpms what is encrypted
                raise BlobError(PtmResult.TPM_KEYNOTFOUND, "The data is encrypted.")
            return stream
        if key is None:
            payload = find_tlv_untrusted(stream, BlobTag.DATA)
            if payload is None:
                raise BlobError(PtmResult.TPM_FAIL, "Could not find plain data in byte stream.")
            return payload
        if flags & BlobFlag.ENCRYPTED:
            _check_size(key, flags & BlobFlag.KEY_256BIT)
        payload = key.unseal_untrusted(BlobTag.ENCRYPTED_DATA, BlobTag.IV_DATA, stream)
        if find_tlv_untrusted(stream, BlobTag.IV_DATA) is None and not is_payload(name, payload):
            # The same HMAC fits a blob whose IV somebody moved to the end of the ciphertext.
            raise BlobError(PtmResult.TPM_DECRYPT_ERROR, "The decrypted data is no state of a TPM")
        return payload


def _is_other_way(stream: bytes, key: Key | None) -> bool:
    """Whether the state is encrypted and there is no key, or the other way round."""
    found = BlobTag.ENCRYPTED_DATA if key is None else BlobTag.DATA
    return find_tlv_untrusted(stream, found) is not None


def _need(key: Key | None, kind: str, name: str) -> Key:
    if key is None:
        raise BlobError(PtmResult.TPM_KEYNOTFOUND, f"Missing {kind} key to decrypt {name}")
    return key


def _check_size(key: Key, needs_256: int) -> None:
    if key.is_256bit != bool(needs_256):
        bits = 256 if needs_256 else 128
        reason = f"Wrong decryption key. Need {bits} bit key."
        raise BlobError(PtmResult.TPM_BAD_KEY_PROPERTY, reason)
