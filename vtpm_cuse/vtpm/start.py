"""From which state a TPM starts, and what is said when it cannot."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from vtpm_cuse import faults
from vtpm_cuse.engine.base import StateType
from vtpm_cuse.errors import (
    EngineError,
    PtmError,
    StateDamaged,
    StateKeyRejected,
    StorageError,
    VtpmError,
)
from vtpm_cuse.storage.base import PERMANENT, left_over
from vtpm_cuse.wire.profile import oldest_library, stored_profile_untrusted
from vtpm_cuse.wire.ptm import PtmBlobType, PtmConfigFlag, PtmResult

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vtpm_cuse.engine.base import Engine
    from vtpm_cuse.storage.sealed import SealedStore

log = logging.getLogger(__name__)

_STATE_TYPES: Final = {PtmBlobType[f"PTM_BLOB_TYPE_{kind.name}"]: kind for kind in StateType}


def start_engine(engine: Engine, store: SealedStore, *, given: bool, away: bool) -> None:
    """Starts it from what is stored, else from its backup, as far as the store keeps one.

    Args:
        engine: Is off.
        store: Where its state is.
        given: It starts from a permanent state that another process has given instead.
        away: The state may be another process': nothing is put in its place.

    Raises:
        PtmError: It does not start; with the result that PTM_INIT answers.
    """
    store.last_loaded = ""
    try:
        if given:
            need_vacancy(store)
        elif not away and (backup := store.blobs.restore_backup()):
            log.warning(
                "%s is missing: the TPM starts from %s", store.blobs.where(PERMANENT), backup
            )
        engine.start()
    except VtpmError as exc:
        lack = _lack_of(engine, store) if isinstance(exc, EngineError) else ""
        refusal = PtmError(_start_result(engine, store, exc), _explained(store, exc, lack))
        # A state of a newer library is not damaged, and newer than what its backup has.
        if away or lack or not _start_from_backup(engine, store, exc):
            raise refusal from exc


def need_vacancy(store: SealedStore) -> None:
    """Before a TPM that another process gives: it may replace one, but not join what is left."""
    if left := store.blobs.remains():
        raise left_over(store.blobs, left)


def resumes(given: Mapping[StateType, bytes | None], store: SealedStore) -> bool:
    """Whether a start finds a volatile state: one that was given, be it none, hides the stored."""
    if StateType.VOLATILE in given:
        return given[StateType.VOLATILE] is not None
    try:
        return StateType.VOLATILE.blob_name in store.blobs.sizes()
    except StorageError:  # the start itself says what is wrong, and what to do
        return False


def _start_from_backup(engine: Engine, store: SealedStore, exc: VtpmError) -> bool:
    """Whether the TPM runs after all; the state that was refused is the backup then."""
    blobs = store.blobs
    if not _is_permanent_damaged(store, exc):
        return False
    try:
        kept = blobs.try_backup()
        if not kept:
            return False
        log.warning("%s cannot be used: %s", blobs.where(PERMANENT), exc)
        log.warning("Attempting to start with backup state file.")
        try:
            engine.start()
        except VtpmError:
            blobs.end_try(accepted=False)
            return False
        blobs.end_try(accepted=True)
    except StorageError as failure:
        log.warning("The backup could not be tried in full: %s", failure)
        return engine.running
    log.warning("The TPM runs from its backup; the state that was refused is now %s", kept)
    return True


def _is_permanent_damaged(store: SealedStore, exc: VtpmError) -> bool:
    """Whether a failed start can be the permanent state's fault, and not a missing key's."""
    if isinstance(exc, EngineError):
        return store.last_loaded == PERMANENT
    return (
        isinstance(exc, (StateDamaged, StateKeyRejected))
        and exc.path == store.blobs.where(PERMANENT)
        and (isinstance(exc, StateDamaged) or exc.result == PtmResult.TPM_DECRYPT_ERROR)
    )


def _start_result(engine: Engine, store: SealedStore, exc: VtpmError) -> int:
    """One code for a TPM 2; for a TPM 1.2 the cause, but not of its volatile state."""
    if engine.tpm2:
        return PtmResult.TPM_RC_FAILURE
    volatile = store.blobs.where(StateType.VOLATILE.blob_name)
    if isinstance(exc, StorageError) and exc.path == volatile:
        return PtmResult.TPM_FAIL
    return faults.tpm_result(exc)


def state_type(kind: int, unknown: PtmResult) -> StateType:
    """Which state a request means by a `PtmBlobType`. Raises PtmError with *unknown*."""
    try:
        return _STATE_TYPES[PtmBlobType(kind)]
    except ValueError:
        raise PtmError(unknown, f"Unknown blob type {kind}") from None


def give_state(engine: Engine, kind: StateType, payload: bytes | None) -> None:
    """Gives a stopped engine the state for its next start. Raises EngineError, PtmError."""
    try:
        engine.set_state(kind, payload)
    except EngineError as exc:
        lack = _lack_for(engine, payload or b"") if kind is StateType.PERMANENT else ""
        if lack:
            raise PtmError(faults.tpm_result(exc), f"{exc}: {lack}") from exc
        raise


def _lack_of(engine: Engine, store: SealedStore) -> str:
    """`_lack_for` the permanent state that is stored, if that is what was refused."""
    if store.last_loaded != PERMANENT:
        return ""
    try:
        return _lack_for(engine, store.load(PERMANENT))
    except StorageError:
        return ""


def _lack_for(engine: Engine, permanent: bytes) -> str:
    """What this library lacks to read a permanent state that it refuses, and the cure, if so."""
    profile = stored_profile_untrusted(permanent) if engine.tpm2 else None
    if profile is None or profile.is_for(engine.version):
        return ""
    return (
        f"its profile '{profile.name}' has StateFormatLevel {profile.level}, which libtpms "
        f"{'.'.join(map(str, engine.version))} does not read; nothing was changed: install "
        f"{oldest_library(profile.level)}"
    )


def _explained(store: SealedStore, exc: VtpmError, lack: str) -> str:
    """Which state is at fault for a failed start, why, and what can be done."""
    blobs, name = store.blobs, store.last_loaded
    if lack:
        return f"{exc}: libtpms refuses {blobs.where(name)}: {lack}"
    if isinstance(exc, StateKeyRejected):
        return f"{exc}; nothing was changed: {_key_cure(store, exc)}"
    if isinstance(exc, StateDamaged):
        kinds = (kind.blob_name for kind in StateType)
        name = next((kind for kind in kinds if blobs.where(kind) == exc.path), PERMANENT)
        return f"{exc}; {blobs.remedy(name)}"
    if isinstance(exc, EngineError) and name:
        why = "it is damaged, of another TPM, or of a libtpms that is newer than this one"
        return f"{exc}: libtpms refuses {blobs.where(name)}: {why}; {blobs.remedy(name)}"
    return str(exc)


def _key_cure(store: SealedStore, exc: StateKeyRejected) -> str:
    if not store.config_flags & PtmConfigFlag.PTM_CONFIG_FLAG_FILE_KEY:
        return "it is encrypted and needs --key with the key that it was written with"
    if exc.result == PtmResult.TPM_FAIL:
        return "it is not encrypted, so leave out --key"
    if exc.result == PtmResult.TPM_DECRYPT_ERROR:
        return "it needs the key that it was written with, or is damaged"
    return "it needs the key that it was written with"
