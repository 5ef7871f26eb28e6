"""Payloads in, payloads out: the blob format around any store, and migration blobs.

This is the one place where a payload gets its header and TLV layer; keys will
join here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vtpm_cuse.errors import PtmError, StateDamaged
from vtpm_cuse.wire.blob import (
    BlobFlag,
    BlobTag,
    find_tlv_untrusted,
    split_header_untrusted,
    tlv,
    with_header,
)
from vtpm_cuse.wire.ptm import PtmResult, PtmStateFlag

if TYPE_CHECKING:
    from vtpm_cuse.storage.base import StateStore


class SealedStore:
    """A store of payloads (implements `engine.base.Nvram`) on a store of blobs."""

    def __init__(self, blobs: StateStore) -> None:
        self.blobs = blobs

    def load(self, name: str) -> bytes:
        """Returns the payload. Raises StateMissing, StateDamaged, StorageError."""
        blob = self.blobs.load(name)
        try:
            header, body = split_header_untrusted(blob)
            return body if header.version == 1 else _plain_data(body)
        except PtmError as exc:
            raise StateDamaged(name, exc.reason, exc.result) from exc

    def store(self, name: str, data: bytes) -> None:
        """Keeps the payload, durably. Raises StorageError."""
        self.blobs.store(name, with_header(BlobFlag(0), tlv(BlobTag.DATA, data)))

    def delete(self, name: str, *, must_exist: bool) -> None:
        """Removes the blob. Raises StorageError."""
        self.blobs.delete(name, must_exist=must_exist)

    def to_migration(self, payload: bytes, *, decrypted: bool) -> tuple[PtmStateFlag, bytes]:
        """Wraps a payload for another TPM; the flag says whether the file key still covers it."""
        del decrypted  # nothing is encrypted without keys
        inner = tlv(BlobTag.DATA, payload)
        body = tlv(BlobTag.MIGRATION_DATA, inner)
        return PtmStateFlag(0), with_header(BlobFlag.MIGRATION_DATA, body)

    def from_migration_untrusted(self, name: str, blob: bytes, flags: int) -> bytes:
        """Unwraps what `to_migration` or the C suite made; empty for a bare header.

        Raises:
            PtmError: With the C suite's result code.
        """
        header, body = split_header_untrusted(blob)
        if not body:
            return b""
        if header.flags & BlobFlag.MIGRATION_ENCRYPTED:
            raise PtmError(PtmResult.TPM_KEYNOTFOUND, f"Missing migration key to decrypt {name}")
        if header.flags & BlobFlag.ENCRYPTED or flags & PtmStateFlag.PTM_STATE_FLAG_ENCRYPTED:
            raise PtmError(PtmResult.TPM_KEYNOTFOUND, f"Missing state key to decrypt {name}")
        if header.version == 1:
            return body
        inner = find_tlv_untrusted(body, BlobTag.MIGRATION_DATA)
        if inner is None:
            raise PtmError(PtmResult.TPM_FAIL, "Could not find migration data in byte stream.")
        return _plain_data(inner)


def _plain_data(stream: bytes) -> bytes:
    payload = find_tlv_untrusted(stream, BlobTag.DATA)
    if payload is None:
        raise PtmError(PtmResult.TPM_FAIL, "Could not find plain data in byte stream.")
    return payload
