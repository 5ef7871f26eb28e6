"""The state of one TPM, for its worker: what that asks for is checked here, and done.

Payloads come without a key, in the header that a worker gives them; how they are kept is the
manager's business alone.
"""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Final

from vtpm_cuse.errors import (
    BlobError,
    ChannelError,
    StateDamaged,
    StateKeyRejected,
    StateMissing,
    StorageError,
    UsageError,
)
from vtpm_cuse.files import open_to_read
from vtpm_cuse.fleet.heritage import SavedVault
from vtpm_cuse.fleet.messages import Answer, Call, Message, described
from vtpm_cuse.service.keys import check_source, given_key, open_key
from vtpm_cuse.storage.base import BLOB_NAMES, PERMANENT
from vtpm_cuse.storage.keys import Key
from vtpm_cuse.storage.sealed import SealedStore
from vtpm_cuse.storage.stores import open_directory, open_store
from vtpm_cuse.wire.blob import (
    BLOB_SIZE_MAX,
    BlobFlag,
    BlobTag,
    find_tlv_untrusted,
    is_payload,
    split_header_untrusted,
    tlv,
    with_header,
)
from vtpm_cuse.wire.ptm import PtmResult

if TYPE_CHECKING:
    from collections.abc import Callable

    from vtpm_cuse.config import KeySource, Secret
    from vtpm_cuse.storage.reserve import Reserve

QUICK: Final = frozenset({Call.LOAD, Call.SIZES, Call.REMAINS, Call.LOCK})
"""What flushes nothing."""


class Vault:
    """One TPM's state.

    Args:
        folder: Where it is; it is there. None for a TPM that is being made, in memory.
        key: Encrypts what is kept; a worker never sees it.
        may_begin: A TPM that is not there is to be made: whoever gives its folder a name puts it on
            the disk before. Else it is missing, and that is a fault.
        reserve: Of one that stays open, among many.

    Attributes:
        closed: The TPM has been shut down in order, and its state given up.
    """

    def __init__(
        self,
        folder: str | None,
        key: Key | None = None,
        *,
        may_begin: bool = False,
        reserve: Reserve | None = None,
    ) -> None:
        self._directory = None if folder is None else open_directory(folder, fsync=not may_begin)
        self.blobs = self._directory or open_store("mem://", tpm2=True)
        self._sealed = SealedStore(self.blobs, key, reserve=reserve)
        self._key = key
        self._may_begin = may_begin
        self.closed = False

    @classmethod
    def of(
        cls,
        folder: str,
        source: KeySource | None,
        secret: Secret | None = None,
        *,
        may_begin: bool = False,
        reserve: Reserve | None = None,
    ) -> Vault:
        """With the key that is kept there, or is given. Raises StateKeyRejected where it cannot be had."""
        if secret is not None and not (source and source.is_given):
            reason = "is kept elsewhere" if source else "is none: it is not encrypted"
            raise StateKeyRejected("its key", reason, PtmResult.TPM_BAD_PARAMETER)
        if source is None:
            return cls(folder, may_begin=may_begin, reserve=reserve)
        try:
            check_source(source)
            key = given_key(source, secret) if source.is_given else _key_at(source)
        except (UsageError, OSError) as exc:
            reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
            where = source.file or source.pwdfile or source.credential
            name = f"its key {where}" if where else "its key"
            raise StateKeyRejected(name, reason, PtmResult.TPM_KEYNOTFOUND) from exc
        return cls(folder, key, may_begin=may_begin, reserve=reserve)

    def lock(self) -> None:
        """For as long as it is on. Raises StorageError."""
        self.closed = False
        self.blobs.lock()

    @classmethod
    def resume(cls, folder: str, saved: SavedVault, reserve: Reserve) -> Vault:
        """What an earlier manager has left of one that is on."""
        found = cls(folder, None if saved.key is None else Key(saved.key), reserve=reserve)
        if found._directory is not None:
            found._directory.take_over(saved.lock)
        return found

    @property
    def saved(self) -> SavedVault:
        """It as plain values."""
        lock = None if self._directory is None else self._directory.lock_fd
        return SavedVault(lock, None if self._key is None else self._key.secret)

    def leave(self) -> None:
        """It is not used any more, and stays locked by the descriptor in `saved`."""
        if self._directory is not None:
            self._directory.leave()
        self.blobs.close()

    def forget_volatile(self) -> None:
        """A start after a time without power is a cold one. Raises StorageError."""
        self.blobs.delete(BLOB_NAMES[1])

    def permanent(self) -> bytes:
        """The permanent state, decrypted. Raises StorageError."""
        return self._sealed.load(PERMANENT)

    def begin(self, permanent: bytes) -> None:
        """A TPM that is to be has this permanent state. Raises StorageError."""
        self._sealed.store(PERMANENT, permanent)
        self._may_begin = False

    def begin_with_untrusted(self, blob: bytes) -> None:
        """The same of a permanent state as a file has it, by the same key. Raises StorageError."""
        aside = open_store("mem://", tpm2=True)
        aside.store(PERMANENT, blob)
        try:
            permanent = SealedStore(aside, self._key).load(PERMANENT)
        except StateKeyRejected as exc:
            reason = "is encrypted: name its key"
            if self._key is not None:
                reason = "is not encrypted by this key"
            raise StateKeyRejected("its state", reason, exc.result) from exc
        if not is_payload(PERMANENT, permanent):
            raise StateDamaged(PERMANENT, "is no state of a TPM", PtmResult.TPM_FAIL)
        self.begin(permanent)

    def close(self) -> None:
        """Others may have it."""
        self.closed = True
        self.blobs.close()

    def permanent_blob(self) -> bytes:
        """The permanent state as LOAD gives it; nothing where that says what is wrong."""
        try:
            return self._load(PERMANENT)
        except StorageError:
            return b""

    def answer_untrusted(self, request: Message) -> Message:
        """What a worker gets for *request*. Raises ChannelError for what no worker asks for."""
        if not isinstance(request.kind, Call) or request.descriptors:
            raise ChannelError("no request of a store")
        if request.kind is Call.ROOM or request.number >= len(BLOB_NAMES):
            raise ChannelError(f"a blob of number {request.number}")
        if self.closed and request.kind is not Call.CLOSE:
            raise ChannelError("a request behind the end")
        name = BLOB_NAMES[request.number]
        calls: dict[Call, Callable[[], bytes | None]] = {
            Call.LOAD: lambda: self._load(name),
            Call.STORE: lambda: self._store(name, request.body),
            Call.DELETE: lambda: self._delete(name, must_exist=bool(request.flags)),
            Call.SIZES: lambda: json.dumps(self.blobs.sizes()).encode(),
            Call.REMAINS: lambda: self.blobs.remains().encode(),
            Call.LOCK: self.blobs.lock,
            Call.UNLOCK: self.blobs.unlock,
            Call.CLOSE: self.close,
        }
        try:
            return Message(Answer.DONE, calls[request.kind]() or b"")
        except StorageError as exc:
            return Message(Answer.FAILED, described(exc))

    def _load(self, name: str) -> bytes:
        try:
            payload = self._sealed.load(name)
        except StateMissing as exc:
            if name == PERMANENT and not self._may_begin:
                raise StateDamaged(exc.path, "is missing", PtmResult.TPM_FAIL) from exc
            raise
        return with_header(BlobFlag(0), tlv(BlobTag.DATA, payload))

    def _store(self, name: str, blob: bytes) -> None:
        payload = None
        if len(blob) <= BLOB_SIZE_MAX:
            try:
                payload = find_tlv_untrusted(split_header_untrusted(blob)[1], BlobTag.DATA)
            except BlobError as exc:
                raise ChannelError(str(exc)) from exc
        if payload is None or not is_payload(name, payload):
            raise ChannelError(f"what is to be stored as {name} is no such state")
        self._sealed.store(name, payload)
        self._may_begin = False

    def _delete(self, name: str, *, must_exist: bool) -> None:
        if name == PERMANENT:
            raise ChannelError("the permanent state is to be deleted")
        self._sealed.delete(name, must_exist=must_exist)


def read_state(folder: str) -> bytes:
    """The permanent state as it is in its file; under its lock. Raises VtpmError."""
    vault = Vault(folder)
    try:
        vault.lock()
        return vault.blobs.load(PERMANENT)
    finally:
        vault.close()


def copy_state(source: str, target: str) -> None:
    """The permanent state; under both locks. Raises VtpmError."""
    with contextlib.ExitStack() as undo:
        vaults = [Vault(source), Vault(target)]
        for vault in vaults:
            undo.callback(vault.close)
            vault.lock()
        blob = vaults[0].blobs.load(PERMANENT)
        vaults[1].blobs.replace_all({PERMANENT: blob})


def _key_at(source: KeySource) -> Key:
    """The key, for which nobody waits. Raises UsageError, OSError."""
    if source.file is not None:
        source = source._replace(file=None, fd=open_to_read(source.file))
    elif source.pwdfile is not None:
        source = source._replace(pwdfile=None, pwdfd=open_to_read(source.pwdfile))
    return open_key(source)
