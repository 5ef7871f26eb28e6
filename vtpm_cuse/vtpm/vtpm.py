"""The vTPM: engine, store, lifecycle and locality, one command at a time.

Synchronous and free of trio: a frontend runs short calls inline and gives the
long ones (`Vtpm.is_long`) to a `serve.worker.Worker`. While one runs there,
only `Vtpm.cancel` and what reads plain attributes may be called beside it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from typing import TYPE_CHECKING, Final, NamedTuple

from vtpm_cuse import faults
from vtpm_cuse.engine.base import StateType
from vtpm_cuse.errors import (
    DeviceError,
    DeviceGone,
    EngineError,
    PtmError,
    StorageError,
    TpmUnavailable,
    VtpmError,
)
from vtpm_cuse.storage.base import PERMANENT
from vtpm_cuse.vtpm.audit import AuditWatch
from vtpm_cuse.vtpm.custody import Custody, Whose
from vtpm_cuse.vtpm.saved import SavedVtpm
from vtpm_cuse.vtpm.shutdown import shut_down
from vtpm_cuse.vtpm.start import give_state, need_vacancy, resumes, start_engine, state_type
from vtpm_cuse.wire.ptm import PtmCommand, PtmConfigFlag, PtmResult, PtmStateFlag
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
    self_test_command,
    startup_command,
)
from vtpm_cuse.wire.tpm2_handles import HANDLE_GIVERS, SESSIONS_TAG, UNKNOWN_SESSION

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vtpm_cuse.engine.base import Engine
    from vtpm_cuse.storage.base import RunLater
    from vtpm_cuse.storage.sealed import SealedStore
    from vtpm_cuse.vtpm.borrowed import Borrowed

    Translate = Callable[[bytes], bytes | None]

log = logging.getLogger(__name__)

_SUCCESS: Final = bytes(4)
_STARTUP: Final = TpmCc.TPM_CC_Startup.to_bytes(4, "big")
_SHUTDOWN: Final = TpmCc.TPM_CC_Shutdown.to_bytes(4, "big")
_SET_LOCALITY: Final = TPM_CC_SET_LOCALITY.to_bytes(4, "big")
_SHA1_THREAD: Final = {
    code.to_bytes(4, "big")
    for code in (TpmOrdinal.TPM_ORD_SHA1Start, TpmOrdinal.TPM_ORD_SHA1Update)
}
_OF_A_CHIP: Final = "and refuses all commands: a reset of its machine may mend that"
_KNOWN_MAX: Final = 64
"""Headers kept: no client may fill the memory with ever new ones."""


class VtpmOptions(NamedTuple):
    """How one vTPM behaves; the defaults are the C suite's.

    Attributes:
        limits: Of its resource manager (`resmgr.quota.Limits`), by name; what is left out has
            its default.
        borrowed: It is not ours: no power, no locality, no state, and it may go away.
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
    limits: tuple[tuple[str, int], ...] = ()
    borrowed: Borrowed | None = None


class Vtpm:
    """One TPM with its state.

    The locality, the buffer size and the last command survive `start`: a VM
    monitor tracks the locality itself and does not send it again after a reset.

    Attributes:
        buffer_max: Bytes of the longest command, and of the longest response.
        starts: How often it was started: what was in it before the last time is no more.
        resumed: The last time, it went on from a volatile state.
        before_snapshot: Called before all that it holds leaves for another TPM.
        on_startup: Called when a TPM2_Startup has succeeded, or it is resumed, before all commands.
        on_given: Told of answers to commands that give a client a handle (`HANDLE_GIVERS`).
        commands: How many it was given since it was made.
        gone: Why a borrowed TPM is no more, once that is so.
        on_gone: Called then, in the thread that has found it out.
    """

    def __init__(
        self, engine: Engine, store: SealedStore | None, options: VtpmOptions | None = None
    ) -> None:
        self._engine = engine
        self._store = store
        self.options = options or VtpmOptions()
        self.tpm2, self.buffer_max = engine.tpm2, engine.buffer_max
        self._profile = self.options.profile
        self._long = long_commands(tpm2=self.tpm2)
        self._known: dict[bytes, int] = {}
        self._last_header = b""
        failure = TpmRc.TPM_RC_FAILURE if self.tpm2 else TpmRc.TPM_FAILEDSELFTEST
        self._failure_mode = failure.to_bytes(4, "big")
        self._failure_said = False
        self._custody = Custody(
            None if store is None else store.blobs, incoming=self.options.incoming
        )
        self._given: dict[StateType, bytes | None] = {}
        self._hashing = False
        self._audit = AuditWatch()
        self._first = -1  # of `commands`, since the start
        self.starts = 0
        self.commands = 0
        self.resumed = False
        self.before_snapshot: Callable[[], None] = lambda: None
        self.on_startup: Callable[[], None] = lambda: None
        self.on_given: Callable[[bytes], None] = lambda _: None
        self.gone: DeviceGone | None = None
        self.on_gone: Callable[[], None] = lambda: None

    # -- life cycle -----------------------------------------------------------------------

    @property
    def borrowed(self) -> bool:
        """Whether it is not ours, and used on the worker alone."""
        return self.options.borrowed is not None

    @property
    def running(self) -> bool:
        """Between `start` and `stop`."""
        return self._engine.running

    def start(self, *, delete_volatile: bool = False) -> None:
        """Starts the TPM, or resets it; makes a new one only where no state exists.

        Raises:
            TpmUnavailable: With the result that PTM_INIT answers; the TPM is stopped.
        """
        if self.running:
            with contextlib.suppress(PtmError):
                self._custody.need()  # the orderly shutdown before a reset writes
        self.stop()
        self._hashing = False
        try:
            self._start(delete_volatile)
        except VtpmError as exc:
            self._engine.stop()
            log.error("Error: Could not initialize the TPM: %s", exc)
            raise TpmUnavailable(faults.tpm_result(exc), str(exc)) from exc

    def _start(self, delete_volatile: bool) -> None:
        self.starts += 1
        if self.borrowed:
            self._engine.start()
            return
        store = self.need_store()
        store.blobs.refresh()
        # A state that is there can be looked at while its owner still has it; none begins so.
        if self._custody.whose is not Whose.INCOMING or PERMANENT not in store.blobs.sizes():
            # PEER: locks after a new TPM may have been made; two could do so at once.
            self._custody.lock()
        if self._profile is not None and self.tpm2:
            self._engine.set_profile(self._profile)
        given, self._given = self._given, {}
        self.resumed = resumes(given, store)
        start_engine(
            self._engine, store, given=StateType.PERMANENT in given, away=self._custody.away
        )
        self._first = self.commands
        self._audit.begin(self._engine.volatile_state() if self.tpm2 and self.resumed else None)
        if self._profile is not None and self.tpm2 and not self._engine.was_manufactured():
            reason = "Error: Profile could not be applied to an existing TPM 2 instance."
            raise PtmError(PtmResult.TPM_FAIL, reason)
        self._profile = None
        self._failure_said = False
        if delete_volatile and not self._custody.away:
            store.delete(StateType.VOLATILE.blob_name, must_exist=False)
        if self.resumed:
            self.on_startup()

    def need_store(self) -> SealedStore:
        """The store. Raises PtmError when there is no state location."""
        if self._store is None:
            raise PtmError(PtmResult.TPM_FAIL, "SWTPM_NVRAM_Init: Missing backend URI.")
        return self._store

    def stop(self, *, orderly: bool = True) -> None:
        """TPM2_Shutdown where due, unless it is to be as by a power cut; off. Harmless when stopped."""
        self._known.clear()
        if self.running:
            if self.borrowed:
                self.before_snapshot()  # else what clients have would stay there for ever
            if orderly:
                self._auto_shutdown()
            self._engine.stop()

    def suspend(self, *, in_order: bool = False) -> SavedVtpm:
        """The vTPM as plain values; only between two commands, and it is not used any more.

        The TPM is off then, and notices nothing; *in_order*, it has had a TPM2_Shutdown, and may never
        be resumed. The store stays open and locked. Raises EngineError: it runs on.
        """
        engine, running = self._engine, self.running
        if running and in_order:
            self._auto_shutdown()
        saved = SavedVtpm(
            self._custody.suspend(),
            running,
            engine.volatile_state() if running else b"",
            engine.locality,
            engine.buffer_size(0)[0],
            self._last_header,
            self._hashing,
            self._failure_said,
            self._profile,
            tuple((state.blob_name, payload) for state, payload in self._given.items()),
            self._audit.session,
        )
        engine.stop()
        return saved

    def resume(self, saved: SavedVtpm) -> None:
        """Goes on where *saved* was suspended; called once, before anything else.

        Raises:
            StorageError: The state is not there as it was, or another process has it locked.
            EngineError: The engine refuses it.
        """
        if self._store is not None:
            self._store.blobs.refresh()
        self._custody.resume(saved.whose)
        engine, kinds = self._engine, {kind.blob_name: kind for kind in StateType}
        engine.locality = saved.locality
        engine.buffer_size(saved.buffer_size)
        self._last_header, self._profile = saved.last_header, saved.profile
        self._hashing, self._failure_said = saved.hashing, saved.failure_said
        self._audit.session = saved.audit
        self._given = {kinds[name]: payload for name, payload in saved.given}
        for kind, payload in self._given.items():
            engine.set_state(kind, payload)
        if saved.running:
            engine.set_state(StateType.VOLATILE, saved.volatile)
            engine.start()

    @property
    def at_rest(self) -> bool:
        """Whether nothing has begun that takes several requests: a measurement, a migration."""
        return not (self._hashing or self._given or self._custody.away)

    def startup(self, kind: TpmSu) -> None:
        """TPM_Startup or TPM2_Startup. The TPM's own answer is not looked at, as in the C suite."""
        self.process(startup_command(kind, tpm2=self.tpm2))

    def self_test(self) -> None:
        """TPM2_SelfTest, of what a first client would otherwise wait for; a TPM 1.2 is quick."""
        if self.tpm2 and self.holds_lock:
            self.process(self_test_command())

    def _auto_shutdown(self) -> None:
        """The last command's code counts, not its success: TPM2_Shutdown(CLEAR) is a guest's wish."""
        wanted = self.tpm2 and self.options.auto_shutdown and not self.borrowed
        # Without the lock nothing may be written.
        if wanted and command_code(self._last_header) != _SHUTDOWN and not self._custody.away:
            self._last_header = shut_down(self._engine) or self._last_header

    # -- commands -------------------------------------------------------------------------

    def is_long(self, command: bytes) -> bool:
        """Whether the command may take long enough to belong on a worker."""
        if self.borrowed:  # a chip takes milliseconds for the least of them
            return self.running
        return self.running and (command_code(command) in self._long or self._custody.away)

    def process(self, command: bytes) -> bytes:
        """One command, one response; never raises: a fault becomes a TPM response."""
        if not self._engine.running or (self._custody.away and not self._custody.take_back()):
            return self._refusal(TpmRc.TPM_FAIL, TpmRc.TPM_RC_FAILURE)
        if len(command) < TPM_HEADER_SIZE:
            return self._refusal(TpmRc.TPM_BAD_PARAM_SIZE, TpmRc.TPM_RC_INSUFFICIENT)
        self._last_header = command[:TPM_HEADER_SIZE]
        code = command_code(command)
        if code == _SET_LOCALITY:
            return self._set_locality_command(command)
        if code == _STARTUP:
            answer = self._execute(command)
            if answer[6:TPM_HEADER_SIZE] == _SUCCESS:
                self.on_startup()
            return answer
        if code in HANDLE_GIVERS:
            self.on_given(answer := self._execute(command))
            return answer
        if not self.is_long(command) and len(self._known) < _KNOWN_MAX:
            self._known[self._last_header] = command_size(command)
        return self._execute(command)

    def process_known(self, command: bytes, translate: Translate | None = None) -> bytes | None:
        """As `process`, by a shorter way; None, with nothing done, where that has more to look at.

        It takes a whole short command with a header that `process` has seen since the start, and
        gives the TPM what *translate* makes of it, if anything.
        """
        header = command[:TPM_HEADER_SIZE]
        known = self._known.get(header) == len(command)
        given = (translate(command) if translate else command) if known else None
        if given is None:
            return None
        self._last_header = header
        return self._execute(given)

    def _execute(self, command: bytes) -> bytes:
        self.commands += 1
        if self.gone is not None:
            return self._refusal(TpmRc.TPM_FAIL, TpmRc.TPM_RC_FAILURE)
        try:
            answer = self._engine.process(command)
            if answer[6:TPM_HEADER_SIZE] == self._failure_mode:
                self._say_failure("by itself: with --log level=5 libtpms says more")
            if answer[:2] == SESSIONS_TAG or self._audit.session:
                self._audit.note(command, answer)
            return answer
        except StorageError as exc:
            self._say_failure(f"for it could not store its state: {exc}")
        except EngineError as exc:
            log.error("The TPM could not finish a command: %s", exc)
        except DeviceGone as exc:  # who serves ends by it
            self.gone = exc
            self.on_gone()
        except Exception:  # a bug of ours must not take the device away
            log.exception("The TPM could not finish a command")
        return self._refusal(TpmRc.TPM_FAIL, TpmRc.TPM_RC_FAILURE)

    def _say_failure(self, reason: str) -> None:
        """Once a start. Nobody but a client may end it: a reset empties the PCRs that it trusts."""
        if not self._failure_said:
            self._failure_said = True
            if self.borrowed:
                log.error("The TPM is in failure mode, %s", _OF_A_CHIP)
                return
            log.error(
                "The TPM is in failure mode and refuses all commands, %s; mend that if need be, "
                "then reset it: restart its VM or this program, or 'swtpm_ioctl -i'",
                reason,
            )

    def manage(self, command: bytes) -> bytes:
        """As `process` for a command of the resource manager's, which is no client's last one."""
        if not self._engine.running or (self._custody.away and not self._custody.take_back()):
            return self._refusal(TpmRc.TPM_FAIL, TpmRc.TPM_RC_FAILURE)
        return self._execute(command)

    def query(self, command: bytes) -> bytes:
        """The response to a command of ours that only asks, in locality 0: no client notices it.

        Raises:
            DeviceError: EIO while the TPM is off; EBUSY while the state is handed out, and where
                the TPM would lose what a client does in several commands.
            VtpmError: The TPM fails.
        """
        self.need_quiet()
        with self._in_locality(0):
            return self._engine.process(command)

    @contextlib.contextmanager
    def asked_at_start(self) -> Iterator[None]:
        """For questions of ours before the first command, which end no exclusive audit session.

        Raises:
            DeviceError: As `query`.
            VtpmError: The TPM is off: where it went on from a volatile state it does not once more.
        """
        self._need_rest()
        is_known = self.commands == self._first and self._audit.session != UNKNOWN_SESSION
        if self._audit.session and not is_known:
            raise DeviceError(errno.EBUSY)
        with self._audit.kept(self._engine):
            yield

    def need_quiet(self) -> None:
        """Raises DeviceError where a question of ours would be noticed, as `query` does."""
        self._need_rest()
        if self._audit.session:
            raise DeviceError(errno.EBUSY)

    def _need_rest(self) -> None:
        if not self.running:
            raise DeviceError(errno.EIO)
        if self.borrowed:  # on the worker it would be one command more of many
            raise DeviceError(errno.EOPNOTSUPP)
        thread = not self.tpm2 and command_code(self._last_header) in _SHA1_THREAD
        # Any command may update a clock in the state, which may be another process' by now.
        if thread or self._hashing or self._custody.away:
            raise DeviceError(errno.EBUSY)

    def cancel(self) -> int:
        """Asks a running command to end early; returns the result code. From any thread."""
        return self._engine.cancel()

    def abort(self) -> None:
        """The process wants to end: whatever runs or blocks is to end early. From any thread."""
        self._custody.abort()
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
        highest = 0 if self.borrowed else 3 if self.options.reject_locality_4 else 4
        if locality > highest:
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
        self._custody.need()  # it sets the tpmEstablished bit, which a TPM 1.2 stores
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
        self._custody.need()
        with self._in_locality(locality):
            return self._engine.reset_established()

    @contextlib.contextmanager
    def _in_locality(self, locality: int) -> Iterator[None]:
        """For what is no client's choice; theirs comes back behind it."""
        before, self._engine.locality = self._engine.locality, locality
        try:
            yield
        finally:
            self._engine.locality = before

    # -- the lock, and its way to another host ---------------------------------------------

    @property
    def holds_lock(self) -> bool:
        """Whether the state is surely locked, so that locking it again does nothing."""
        return self.running and not self._custody.away

    @property
    def state_lost(self) -> bool:
        """Another process has the state now: end, without a word to any client."""
        return self._custody.whose is Whose.LOST

    def may_wait_for_lock(self, command: PtmCommand | None) -> bool:
        """Whether a PTM request may block for the lock's retries, and so belongs on a worker."""
        return command is PtmCommand.PTM_LOCK_STORAGE or (
            self._custody.away and command in {PtmCommand.PTM_INIT, PtmCommand.PTM_SET_STATEBLOB}
        )

    def lock_storage(self, retries: int) -> None:
        """Locks the state, trying again every 10 ms. Blocks. Raises StorageError."""
        self._custody.lock(retries)

    def release_storage(self) -> None:
        """Lets the destination of a migration lock the state; the next command takes it back."""
        self._custody.hand_out()
        self._known.clear()

    # -- state ----------------------------------------------------------------------------

    def defer_to(self, run_later: RunLater) -> None:
        """From now on, *run_later* may be given what no answer has to wait for."""
        if self._store is not None:
            self._store.blobs.defer_to(run_later)

    def config_flags(self) -> PtmConfigFlag:
        """Which keys are in use."""
        return PtmConfigFlag(0) if self._store is None else self._store.config_flags

    def store_volatile(self) -> None:
        """Writes the volatile state beside the permanent one. Raises VtpmError."""
        self._custody.need()
        self.before_snapshot()
        payload = self._engine.volatile_state()
        self.need_store().store(StateType.VOLATILE.blob_name, payload)

    def export_blob(self, kind: int, *, decrypted: bool) -> tuple[PtmStateFlag, bytes]:
        """A migration blob. Raises VtpmError: PtmError, StateLocked, StateMissing, StorageError, EngineError."""
        store = self.need_store()
        state = state_type(kind, PtmResult.TPM_FAIL)
        if state is StateType.VOLATILE:
            if not self._custody.away:  # else the TPM must do nothing
                self.before_snapshot()
            payload = self._engine.volatile_state()
            # It is on its way to another TPM: no later start here may resume from a stored one.
            if not self._custody.away:  # else the directory may be another process' by now
                store.delete(state.blob_name, must_exist=False)
        else:
            payload = store.load(state.blob_name)
        return store.to_migration(payload, decrypted=decrypted)

    def import_blob(self, kind: int, flags: int, blob: bytes) -> None:
        """Takes a migration blob for the next start; an empty one hides what is stored.

        The order is permanent, volatile, savestate. Nothing is written before the start.

        Raises:
            VtpmError: PtmError, BlobError, StorageError, EngineError; all blobs given before are dropped.
        """
        state = state_type(kind, PtmResult.TPM_BAD_PARAMETER)
        store = self.need_store()
        try:
            if not self.running:
                store.blobs.refresh()
            self._custody.lock()
            if state is StateType.PERMANENT:
                need_vacancy(store)
        except StorageError as exc:
            raise PtmError(PtmResult.TPM_IOERROR, str(exc)) from exc
        payload = b""
        if len(blob) > 0:
            payload = store.from_migration_untrusted(state.blob_name, blob, flags)
        if state is StateType.PERMANENT and not payload:
            # PEER: the next start then ends the process. Here a stored TPM stays as it is.
            log.warning("An empty permanent state was given; the stored one stays in use")
            return
        given, self._given = self._given, {}  # as in the engine, should it refuse
        give_state(self._engine, state, payload or None)
        self._given = {**given, state: payload or None}

    def close(self) -> None:
        """`stop`, then gives up the store's lock and descriptors."""
        self.stop()
        if self._store is not None:
            self._store.blobs.close()
