"""The vTPM: engine, store, lifecycle and locality, one command at a time.

Synchronous and free of trio: a frontend runs short calls inline and gives the
long ones (`Vtpm.is_long`) to a `device.worker.Worker`. While one runs there,
only `Vtpm.cancel` and what reads plain attributes may be called beside it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import time
from typing import TYPE_CHECKING, Final, NamedTuple

from vtpm_cuse import faults
from vtpm_cuse.engine.base import StateType
from vtpm_cuse.errors import (
    DeviceError,
    EngineError,
    PtmError,
    StateDamaged,
    StateKeyRejected,
    StateLocked,
    StorageError,
    VtpmError,
)
from vtpm_cuse.storage.base import left_over
from vtpm_cuse.wire.ptm import PtmBlobType, PtmCommand, PtmConfigFlag, PtmResult, PtmStateFlag
from vtpm_cuse.wire.tpm import (
    TPM_CC_SET_LOCALITY,
    TPM_HEADER_SIZE,
    TpmCc,
    TpmOrdinal,
    TpmRc,
    TpmSu,
    command_code,
    command_size,
    long_commands,
    response,
    response_code,
    self_test_command,
    shutdown_command,
    startup_command,
)

if TYPE_CHECKING:
    from vtpm_cuse.engine.base import Engine
    from vtpm_cuse.storage.base import Beside
    from vtpm_cuse.storage.sealed import SealedStore

log = logging.getLogger(__name__)

_SHUTDOWN: Final = TpmCc.TPM_CC_Shutdown.to_bytes(4, "big")
_SET_LOCALITY: Final = TPM_CC_SET_LOCALITY.to_bytes(4, "big")
_SHA1_THREAD: Final = {
    code.to_bytes(4, "big")
    for code in (TpmOrdinal.TPM_ORD_SHA1Start, TpmOrdinal.TPM_ORD_SHA1Update)
}
_PERMANENT: Final = StateType.PERMANENT.blob_name
_FAILURE_MODE: Final = {
    False: TpmRc.TPM_FAILEDSELFTEST.to_bytes(4, "big"),
    True: TpmRc.TPM_RC_FAILURE.to_bytes(4, "big"),
}
_LOCK_RETRY_SECONDS: Final = 0.01
_HANDOVER_RETRIES: Final = 300
"""Tries, 3 s of them, as in the C suite: the destination of a migration that came to nothing gives the lock back."""
_LOCK_RETRIES_MAX: Final = 6000
"""Tries, a minute of them: whoever asks for more waits for what will not come."""
_KNOWN_MAX: Final = 64
"""Headers kept: no client may fill the memory with ever new ones."""
_STATE_TYPES: Final = {
    PtmBlobType.PTM_BLOB_TYPE_PERMANENT: StateType.PERMANENT,
    PtmBlobType.PTM_BLOB_TYPE_VOLATILE: StateType.VOLATILE,
    PtmBlobType.PTM_BLOB_TYPE_SAVESTATE: StateType.SAVESTATE,
}


class VtpmOptions(NamedTuple):
    """How one vTPM behaves; the defaults are the C suite's.

    Attributes:
        incoming: A migration brings the state: the first start does not lock it, for its
            owner still does.
        release_outgoing: The lock is released behind the last blob, on a device too.
    """

    auto_shutdown: bool = True
    reject_locality_4: bool = False
    allow_set_locality: bool = False
    incoming: bool = False
    release_outgoing: bool = False
    profile: str | None = None


class Vtpm:
    """One TPM with its state.

    The locality, the buffer size and the last command survive `start`: a VM
    monitor tracks the locality itself and does not send it again after a reset.

    Attributes:
        state_lost: Another process has the state now: end, without a word to any client.
    """

    def __init__(
        self, engine: Engine, store: SealedStore | None, options: VtpmOptions | None = None
    ) -> None:
        self._engine = engine
        self._store = store
        self.options = options or VtpmOptions()
        self.tpm2 = engine.tpm2
        self._profile = self.options.profile
        self._long = long_commands(tpm2=self.tpm2)
        self._known: dict[bytes, int] = {}
        self._last_header = b""
        self._failure_mode = _FAILURE_MODE[self.tpm2]
        self._failure_said = False
        self._incoming = self._lock_pending = self.options.incoming
        self._is_given = False
        self._lock_retries = 0
        self._hurried = False
        self._hashing = False
        self.state_lost = False

    # -- life cycle -----------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """Between `start` and `stop`."""
        return self._engine.running

    def start(self, *, delete_volatile: bool = False) -> None:
        """Starts the TPM, or resets it; makes a new one only where no state exists.

        Raises:
            PtmError: With the result that PTM_INIT answers; the TPM is stopped.
        """
        if self.running:
            with contextlib.suppress(PtmError):
                self.need_lock()  # the orderly shutdown before a reset writes
        self.stop()
        self._hashing = False
        try:
            self._start(delete_volatile)
        except VtpmError as exc:
            self._engine.stop()
            log.error("Error: Could not initialize the TPM: %s", exc)
            raise PtmError(faults.tpm_result(exc), str(exc)) from exc

    def _start(self, delete_volatile: bool) -> None:
        store = self.need_store()
        store.blobs.refresh()
        # A state that is there can be looked at while its owner still has it; none begins so.
        if not self._incoming or _PERMANENT not in store.blobs.sizes():
            # PEER: locks after a new TPM may have been made; two could do so at once.
            self.lock_storage(self._lock_retries)
        if self._profile is not None and self.tpm2:
            self._engine.set_profile(self._profile)
        self._start_engine(store)
        if self._profile is not None and self.tpm2 and not self._engine.was_manufactured():
            reason = "Error: Profile could not be applied to an existing TPM 2 instance."
            raise PtmError(PtmResult.TPM_FAIL, reason)
        self._profile = None
        self._failure_said = False
        if delete_volatile and not self._lock_pending:
            store.delete(StateType.VOLATILE.blob_name, must_exist=False)

    def _start_engine(self, store: SealedStore) -> None:
        """From what is stored, else from its backup, as far as the store keeps one."""
        store.last_loaded, given, self._is_given = "", self._is_given, False
        try:
            if given:
                self._need_vacancy(store)
            elif not self._lock_pending and (backup := store.blobs.restore_backup()):
                permanent = store.blobs.where(_PERMANENT)
                log.warning("%s is missing: the TPM starts from %s", permanent, backup)
            self._engine.start()
        except VtpmError as exc:
            refusal = PtmError(self._start_result(exc), self._explained(exc))
            if not self._start_from_backup(store, exc):
                raise refusal from exc

    @staticmethod
    def _need_vacancy(store: SealedStore) -> None:
        """Before a TPM that another process gives: it may replace one, but not join what is left."""
        if left := store.blobs.remains():
            raise left_over(store.blobs, left)

    def _start_from_backup(self, store: SealedStore, exc: VtpmError) -> bool:
        """Whether the TPM runs after all; the state that was refused is the backup then."""
        blobs = store.blobs
        if self._lock_pending or not self._is_permanent_damaged(store, exc):
            return False
        try:
            kept = blobs.try_backup()
            if not kept:
                return False
            log.warning("%s cannot be used: %s", blobs.where(_PERMANENT), exc)
            log.warning("Attempting to start with backup state file.")
            try:
                self._engine.start()
            except VtpmError:
                blobs.end_try(accepted=False)
                return False
            blobs.end_try(accepted=True)
        except StorageError as failure:
            log.warning("The backup could not be tried in full: %s", failure)
            return self.running
        log.warning("The TPM runs from its backup; the state that was refused is now %s", kept)
        return True

    @staticmethod
    def _is_permanent_damaged(store: SealedStore, exc: VtpmError) -> bool:
        """Whether a failed start can be the permanent state's fault, and not a missing key's."""
        if isinstance(exc, EngineError):
            return store.last_loaded == _PERMANENT
        return (
            isinstance(exc, (StateDamaged, StateKeyRejected))
            and exc.path == store.blobs.where(_PERMANENT)
            and (isinstance(exc, StateDamaged) or exc.result == PtmResult.TPM_DECRYPT_ERROR)
        )

    def _start_result(self, exc: VtpmError) -> int:
        """One code for a TPM 2; for a TPM 1.2 the cause, but not of its volatile state."""
        if self.tpm2:
            return PtmResult.TPM_RC_FAILURE
        volatile = self.need_store().blobs.where(StateType.VOLATILE.blob_name)
        if isinstance(exc, StorageError) and exc.path == volatile:
            return PtmResult.TPM_FAIL
        return faults.tpm_result(exc)

    def _explained(self, exc: VtpmError) -> str:
        """Which state is at fault for a failed start, why, and what can be done."""
        store = self.need_store()
        blobs, name = store.blobs, store.last_loaded
        if isinstance(exc, StateKeyRejected):
            return f"{exc}; nothing was changed: {self._key_cure(store, exc)}"
        if isinstance(exc, StateDamaged):
            kinds = (kind.blob_name for kind in StateType)
            name = next((kind for kind in kinds if blobs.where(kind) == exc.path), _PERMANENT)
            return f"{exc}; {blobs.remedy(name)}"
        if isinstance(exc, EngineError) and name:
            why = "it is damaged, of another TPM, or of a libtpms that is newer than this one"
            return f"{exc}: libtpms refuses {blobs.where(name)}: {why}; {blobs.remedy(name)}"
        return str(exc)

    @staticmethod
    def _key_cure(store: SealedStore, exc: StateKeyRejected) -> str:
        if not store.config_flags & PtmConfigFlag.PTM_CONFIG_FLAG_FILE_KEY:
            return "it is encrypted and needs --key with the key that it was written with"
        if exc.result == PtmResult.TPM_FAIL:
            return "it is not encrypted, so leave out --key"
        if exc.result == PtmResult.TPM_DECRYPT_ERROR:
            return "it needs the key that it was written with, or is damaged"
        return "it needs the key that it was written with"

    def need_store(self) -> SealedStore:
        """The store. Raises PtmError when there is no state location."""
        if self._store is None:
            raise PtmError(PtmResult.TPM_FAIL, "SWTPM_NVRAM_Init: Missing backend URI.")
        return self._store

    def stop(self) -> None:
        """Orderly TPM2_Shutdown where due, then power off. Harmless when stopped."""
        self._known.clear()
        if self.running:
            self._auto_shutdown()
            self._engine.stop()

    def startup(self, kind: TpmSu) -> None:
        """TPM_Startup or TPM2_Startup. The TPM's own answer is not looked at, as in the C suite."""
        self.process(startup_command(kind, tpm2=self.tpm2))

    def self_test(self) -> None:
        """TPM2_SelfTest, of what a first client would otherwise wait for; a TPM 1.2 is quick."""
        if self.tpm2 and self.holds_lock:
            self.process(self_test_command())

    def _auto_shutdown(self) -> None:
        """An unorderly reset would raise the dictionary attack counter.

        The last command's code counts, not its success: TPM2_Shutdown(CLEAR)
        before a reset is the guest's wish.
        """
        wanted = (
            self.tpm2
            and self.options.auto_shutdown
            and command_code(self._last_header) != _SHUTDOWN
        )
        if not wanted or self._lock_pending:  # without the lock nothing may be written
            return
        for kind in (TpmSu.TPM_SU_STATE, TpmSu.TPM_SU_CLEAR):
            try:
                code = response_code(self._engine.process(shutdown_command(kind)))
            except VtpmError as exc:
                log.warning("Could not shut the TPM down in order: %s", exc)
                return
            if code == TpmRc.TPM_SUCCESS:
                self._last_header = shutdown_command(kind)[:TPM_HEADER_SIZE]
            if code in {TpmRc.TPM_SUCCESS, TpmRc.TPM_RC_INITIALIZE}:
                return

    # -- commands -------------------------------------------------------------------------

    def is_long(self, command: bytes) -> bool:
        """Whether the command may take long enough to belong on a worker."""
        return self.running and (command_code(command) in self._long or self._lock_pending)

    def process(self, command: bytes) -> bytes:
        """One command, one response; never raises: a fault becomes a TPM response."""
        if not self._engine.running or (self._lock_pending and not self._take_state_back()):
            return self._refusal(TpmRc.TPM_FAIL, TpmRc.TPM_RC_FAILURE)
        if len(command) < TPM_HEADER_SIZE:
            return self._refusal(TpmRc.TPM_BAD_PARAM_SIZE, TpmRc.TPM_RC_INSUFFICIENT)
        self._last_header = command[:TPM_HEADER_SIZE]
        code = command_code(command)
        if code == _SET_LOCALITY:
            return self._set_locality_command(command)
        if code not in self._long and len(self._known) < _KNOWN_MAX:
            self._known[self._last_header] = command_size(command)
        return self._execute(command)

    def process_known(self, command: bytes) -> bytes | None:
        """As `process`, by a shorter way; None, with nothing done, where that has more to look at.

        It takes a whole short command with a header that `process` has seen since the start.
        """
        header = command[:TPM_HEADER_SIZE]
        if self._known.get(header) != len(command):
            return None
        self._last_header = header
        return self._execute(command)

    def _execute(self, command: bytes) -> bytes:
        try:
            answer = self._engine.process(command)
            if answer[6:TPM_HEADER_SIZE] == self._failure_mode:
                self._say_failure("by itself: with --log level=5 libtpms says more")
            return answer
        except StorageError as exc:
            self._say_failure(f"for it could not store its state: {exc}")
        except EngineError as exc:
            log.error("The TPM could not finish a command: %s", exc)
        except Exception:  # a bug of ours must not take the device away
            log.exception("The TPM could not finish a command")
        return self._refusal(TpmRc.TPM_FAIL, TpmRc.TPM_RC_FAILURE)

    def _say_failure(self, reason: str) -> None:
        """Once a start. Nobody but a client may end it: a reset empties the PCRs that it trusts."""
        if not self._failure_said:
            self._failure_said = True
            log.error(
                "The TPM is in failure mode and refuses all commands, %s; mend that if need be, "
                "then reset it: restart its VM or this program, or 'swtpm_ioctl -i'",
                reason,
            )

    def query(self, command: bytes) -> bytes:
        """The response to a command of ours that only asks, in locality 0: no client notices it.

        Raises:
            DeviceError: EBUSY while the state is handed out, and where the TPM would lose what
                a client does in several commands.
            VtpmError: The TPM is off, or fails.
        """
        if not self.running:
            raise PtmError(PtmResult.TPM_BAD_ORDINAL, "the TPM is off")
        thread = not self.tpm2 and command_code(self._last_header) in _SHA1_THREAD
        # Any command may update a clock in the state, which may be another process' by now.
        if thread or self._hashing or self._lock_pending:
            raise DeviceError(errno.EBUSY)
        before, self._engine.locality = self._engine.locality, 0
        try:
            return self._engine.process(command)
        finally:
            self._engine.locality = before

    def cancel(self) -> int:
        """Asks a running command to end early; returns the result code. From any thread."""
        return self._engine.cancel()

    def hurry(self) -> None:
        """The process wants to end: whatever runs or blocks is to end early. From any thread."""
        self._hurried = True
        self.cancel()

    def _refusal(self, tpm12: TpmRc, tpm2: TpmRc) -> bytes:
        return response(tpm2 if self.tpm2 else tpm12, tpm2=self.tpm2)

    def _set_locality_command(self, command: bytes) -> bytes:
        """The kernel proxy driver's vendor command; recognised by its code alone."""
        if len(command) <= TPM_HEADER_SIZE:
            return self._refusal(TpmRc.TPM_BAD_PARAM_SIZE, TpmRc.TPM_RC_INSUFFICIENT)
        if not self.options.allow_set_locality:
            return self._refusal(TpmRc.TPM_FAIL, TpmRc.TPM_RC_FAILURE)
        refusal = self.enter_locality(command[TPM_HEADER_SIZE])
        return refusal or response(TpmRc.TPM_SUCCESS, tpm2=self.tpm2)

    # -- what the TPM can tell ------------------------------------------------------------

    def info(self, flags: int) -> str:
        """JSON text (TPMLIB_GetInfo); of a stopped TPM as well. Raises EngineError."""
        return self._engine.info(flags)

    def buffer_size(self, wanted: int) -> tuple[int, int, int]:
        """Sets the buffer size in bytes (0 asks only): in use, smallest, largest."""
        return self._engine.buffer_size(wanted)

    def established(self) -> bool:
        """The tpmEstablished bit. Raises EngineError."""
        return self._engine.established()

    # -- locality and established bit -----------------------------------------------------

    @property
    def locality(self) -> int:
        """Of the next command, 0 to 4."""
        return self._engine.locality

    def set_locality(self, locality: int) -> None:
        """Locality of all later commands, 0 to 4. Raises PtmError."""
        if locality > 4 or (locality == 4 and self.options.reject_locality_4):
            raise PtmError(PtmResult.TPM_BAD_LOCALITY)
        self._engine.locality = locality

    def enter_locality(self, locality: int) -> bytes | None:
        """`set_locality` for what came with a command: the response to that if it is refused."""
        try:
            self.set_locality(locality)
        except PtmError:
            if self.running:  # else `process` has the better answer
                return self._refusal(TpmRc.TPM_BAD_LOCALITY, TpmRc.TPM_RC_LOCALITY)
        return None

    def hash_start(self) -> int:
        """Begins a measurement by the platform (TPM_IO_Hash_Start); returns the result code."""
        self.need_lock()  # it sets the tpmEstablished bit, which a TPM 1.2 stores
        self._hashing = True
        return self._engine.hash_start()

    def hash_data(self, data: bytes) -> int:
        """Goes on with it; returns the result code."""
        return self._engine.hash_data(data)

    def hash_end(self) -> int:
        """Ends it, which extends the PCR; returns the result code."""
        self._hashing = False
        return self._engine.hash_end()

    def reset_established(self, locality: int) -> int:
        """Clears the tpmEstablished bit in *locality* (3 or 4 may); returns the result code."""
        if locality > 4:
            return PtmResult.TPM_BAD_LOCALITY
        self.need_lock()
        before = self._engine.locality
        self._engine.locality = locality
        try:
            return self._engine.reset_established()
        finally:
            self._engine.locality = before

    # -- the lock, and its way to another host ---------------------------------------------

    @property
    def holds_lock(self) -> bool:
        """Whether the state is surely locked, so that locking it again does nothing."""
        return self.running and not self._lock_pending

    def may_wait_for_lock(self, command: PtmCommand | None) -> bool:
        """Whether a PTM request may block for the lock's retries, and so belongs on a worker."""
        return command is PtmCommand.PTM_LOCK_STORAGE or (
            self._lock_pending and command in {PtmCommand.PTM_INIT, PtmCommand.PTM_SET_STATEBLOB}
        )

    def lock_storage(self, retries: int) -> None:
        """Locks the state, trying again every 10 ms, for a minute at most. Blocks.

        PEER: tries as often as it is told to, which can be for years.

        Raises:
            StorageError: It could not be locked.
        """
        retries = min(retries, _LOCK_RETRIES_MAX)
        if self._store is not None:
            while True:
                try:
                    self._store.blobs.lock()
                    break
                except StateLocked:
                    if retries == 0 or self._hurried:
                        raise
                retries -= 1
                time.sleep(_LOCK_RETRY_SECONDS)
        self._incoming = self._lock_pending = False
        self._lock_retries = 0

    def _take_state_back(self) -> bool:
        """Before a command, after the state was handed out; sets `state_lost` when it is gone."""
        try:
            self.lock_storage(self._lock_retries)
        except StorageError as exc:
            log.error("%s", exc)
            self.state_lost = True
            return False
        self.state_lost = False
        return True

    def need_lock(self) -> None:
        """Before anything but a command that writes state. Raises PtmError."""
        if self._lock_pending:
            try:
                self.lock_storage(0)
            except StorageError as exc:
                raise PtmError(PtmResult.TPM_FAIL, str(exc)) from exc

    def release_storage(self) -> None:
        """Lets the destination of a migration lock the state; the next command takes it back."""
        if self._store is not None:
            self._store.blobs.unlock()
            self._known.clear()
            self._lock_pending, self._lock_retries = True, _HANDOVER_RETRIES

    # -- state ----------------------------------------------------------------------------

    def work_beside(self, beside: Beside) -> None:
        """From now on, *beside* may be given what no answer has to wait for."""
        if self._store is not None:
            self._store.blobs.work_beside(beside)

    def config_flags(self) -> PtmConfigFlag:
        """Which keys are in use."""
        return PtmConfigFlag(0) if self._store is None else self._store.config_flags

    def store_volatile(self) -> None:
        """Writes the volatile state beside the permanent one. Raises VtpmError."""
        self.need_lock()
        payload = self._engine.volatile_state()
        self.need_store().store(StateType.VOLATILE.blob_name, payload)

    def export_blob(self, kind: int, *, decrypted: bool) -> tuple[PtmStateFlag, bytes]:
        """A migration blob. Raises VtpmError: PtmError, StateLocked, StateMissing, StorageError, EngineError."""
        store = self.need_store()
        state = self._state_type(kind, PtmResult.TPM_FAIL)
        if state is StateType.VOLATILE:
            payload = self._engine.volatile_state()
            # It is on its way to another TPM: no later start here may resume from a stored one.
            if not self._lock_pending:  # else the directory may be another process' by now
                store.delete(state.blob_name, must_exist=False)
        else:
            payload = store.load(state.blob_name)
        return store.to_migration(payload, decrypted=decrypted)

    def import_blob(self, kind: int, flags: int, blob: bytes) -> None:
        """Takes a migration blob for the next start; an empty one hides what is stored.

        The order is permanent, volatile, savestate. Nothing is written before the start.

        Raises:
            VtpmError: PtmError, StorageError, EngineError; all blobs given before are dropped.
        """
        state = self._state_type(kind, PtmResult.TPM_BAD_PARAMETER)
        store = self.need_store()
        try:
            if not self.running:
                store.blobs.refresh()
            self.lock_storage(self._lock_retries)
            if state is StateType.PERMANENT:
                self._need_vacancy(store)
        except StorageError as exc:
            raise PtmError(PtmResult.TPM_IOERROR, str(exc)) from exc
        payload = b""
        if len(blob) > 0:
            payload = store.from_migration_untrusted(state.blob_name, blob, flags)
        if state is StateType.PERMANENT and not payload:
            # PEER: the next start then ends the process. Here a stored TPM stays as it is.
            log.warning("An empty permanent state was given; the stored one stays in use")
            return
        given, self._is_given = self._is_given, False  # as in the engine, should it refuse
        self._engine.set_state(state, payload or None)
        self._is_given = given or state is StateType.PERMANENT

    @staticmethod
    def _state_type(kind: int, unknown: PtmResult) -> StateType:
        try:
            return _STATE_TYPES[PtmBlobType(kind)]
        except ValueError:
            raise PtmError(unknown, f"Unknown blob type {kind}") from None

    def close(self) -> None:
        """`stop`, then gives up the store's lock and descriptors."""
        self.stop()
        if self._store is not None:
            self._store.blobs.close()
