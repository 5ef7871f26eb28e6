"""libtpms bound by cffi, but for the way back (`callbacks`). No other module sees a C buffer.

libtpms keeps its TPM in process globals: one `LibtpmsEngine` at a time, the last one made.

A callback never lets an exception into C. The seven steps: libtpms calls back
in the thread of the outer call; the callback runs our code; an exception is
kept in ``_fault``; a failure code goes to libtpms; libtpms gives up; the outer
call returns; `_check` raises what was kept.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from vtpm_cuse import faults
from vtpm_cuse.engine import callbacks
from vtpm_cuse.engine._libtpms import ffi
from vtpm_cuse.engine.base import StateType
from vtpm_cuse.errors import (
    EngineError,
    EngineUnavailable,
    StateDamaged,
    StateKeyRejected,
    StateMissing,
)
from vtpm_cuse.wire.tpm import TPM_BUFFER_MAX

if TYPE_CHECKING:
    from vtpm_cuse.engine._libtpms import CData, Libtpms
    from vtpm_cuse.engine.base import Nvram

log = logging.getLogger(__name__)

_SONAME = "libtpms.so.0"
_NOT_THERE = "No such file"
_BROKEN = "file too short", "ELF", "cannot read file data", "undefined symbol"
_REINSTALL = "apt-get install --reinstall libtpms0"
_NOWHERE = 0x7FFFFFFF  # a number that no descriptor can have
_INFO_FLAGS = 0x7FFFFFFF  # an int of C, for which a request has 64 bits
_TPM_FAIL = 0x9
_TPM_RETRY = 0x800
_TPM2_BUFFER_MAX = 16
"""TPMPROP_TPM2_BUFFER_MAX, since libtpms 0.11."""


def _open_library() -> Libtpms:
    try:
        library: Libtpms = ffi.dlopen(_SONAME)
    except OSError as exc:
        if _NOT_THERE not in str(exc):  # but could not be opened, or mapped
            broken = any(sign in str(exc) for sign in _BROKEN)
            raise EngineUnavailable(str(exc), _REINSTALL if broken else "") from exc
        raise EngineUnavailable(f"cannot load {_SONAME}", "apt-get install libtpms0") from exc
    # Of itself libtpms writes to descriptor 2, at any level: the whole command after which it
    # is in failure mode, with what is secret in it.
    library.TPMLIB_SetDebugFD(_NOWHERE)
    return library


_unpack = ffi.unpack
_cast, _WORDS = ffi.cast, ffi.typeof("uint32_t *")


class LibtpmsEngine:
    """The TPM of this process (implements `engine.base.Engine`)."""

    def __init__(self, *, tpm2: bool, nvram: Nvram) -> None:
        self.tpm2 = tpm2
        self.running = False
        self._locality = 0
        self._nvram = nvram
        self._fault: BaseException | None = None
        self._volatile_fault: BaseException | None = None
        _served[:] = [self]
        self._lib = _open_library()
        self._libc = ffi.dlopen(None)
        self._process = self._lib.TPMLIB_Process
        # OWNER: libtpms allocates and grows the response buffer, we reuse it for every command and
        # free it when the TPM is off.
        self._response = ffi.new("unsigned char **")
        self._response_chars = ffi.cast("char **", self._response)  # chars are unpacked to bytes
        self._response_size = ffi.new("uint32_t *")
        self._response_room = ffi.new("uint32_t *")
        self._callbacks = _callback_table()
        self._ask_locality = self._callbacks.tpm_io_getlocality
        self._register_callbacks()
        self._choose_version()
        self.buffer_max = self._property(_TPM2_BUFFER_MAX) or TPM_BUFFER_MAX

    # -- what libtpms can do --------------------------------------------------------------

    @property
    def version(self) -> tuple[int, int, int]:
        """The library's version: major, minor, micro."""
        number = self._lib.TPMLIB_GetVersion()
        return number >> 16, number >> 8 & 0xFF, number & 0xFF

    def _property(self, number: int) -> int | None:
        """What this TPM is built with; None where the library does not know such a property."""
        found = ffi.new("int *")
        return None if self._lib.TPMLIB_GetTPMProperty(number, found) else int(found[0])

    @property
    def has_profiles(self) -> bool:
        """Whether `set_profile` works (libtpms 0.10 and later)."""
        try:
            return bool(self._lib.TPMLIB_SetProfile)
        except ffi.error:
            return False

    def info(self, flags: int) -> str:
        """JSON text (TPMLIB_GetInfo); works stopped as well."""
        text = self._lib.TPMLIB_GetInfo(flags & _INFO_FLAGS)
        if not text:
            raise EngineError("TPMLIB_GetInfo", _TPM_FAIL)
        try:
            return ffi.string(text).decode()
        finally:
            self._libc.free(text)  # OWNER: ours since the return

    def set_debug(self, fd: int, level: int, prefix: str) -> None:
        """Lets libtpms log to *fd*, secrets too; level 0 is off."""
        self._lib.TPMLIB_SetDebugFD(fd if level else _NOWHERE)
        self._lib.TPMLIB_SetDebugLevel(level)
        self._lib.TPMLIB_SetDebugPrefix(os.fsencode(prefix))

    # -- life cycle -----------------------------------------------------------------------

    def start(self) -> None:
        """Powers the TPM on. Raises StorageError, EngineError."""
        self.stop()
        self._choose_version()
        try:
            with callbacks.uninterrupted():
                rc = self._lib.TPMLIB_MainInit()
            if rc == 0 and self._fault is not None and self._fault is self._volatile_fault:
                # libtpms' own choice for a TPM 2 with an unusable volatile state: a cold start.
                log.warning("Ignoring a stored state: %s", self._fault)
                self._fault = None
            self._check("TPMLIB_MainInit", rc)
        except BaseException:
            # After a failed start the version stays chosen until Terminate.
            self._lib.TPMLIB_Terminate()
            raise
        self.running = True

    def stop(self) -> None:
        """Powers it off, without a TPM2_Shutdown. Harmless when stopped."""
        if not self.running:
            return
        self.running = False
        self._lib.TPMLIB_Terminate()
        self._libc.free(self._response[0])
        self._response[0] = ffi.NULL
        self._response_size[0] = self._response_room[0] = 0

    def set_profile(self, profile: str) -> None:
        """JSON profile for the next start. Raises EngineUnavailable (libtpms 0.9), EngineError."""
        if not self.has_profiles:
            raise EngineUnavailable("this libtpms has no profiles", "libtpms 0.10 or newer does")
        self._check("TPMLIB_SetProfile", self._lib.TPMLIB_SetProfile(os.fsencode(profile)))

    def was_manufactured(self) -> bool:
        """Whether the last start made a new TPM; False where the library cannot tell."""
        return self.has_profiles and bool(self._lib.TPMLIB_WasManufactured())

    # -- commands -------------------------------------------------------------------------

    @property
    def locality(self) -> int:
        """Locality of all later commands; not to be set beside a running one."""
        return self._locality

    @locality.setter
    def locality(self, locality: int) -> None:
        self._locality = locality
        self._register_callbacks()

    def process(self, command: bytes) -> bytes:
        """One command, one response. Raises EngineError; StorageError when a callback failed."""
        if not self.running:  # TPM 1.2 would crash, TPM 2 answer nothing
            raise EngineError("TPMLIB_Process", _TPM_FAIL)
        # TPM 1.2 decrypts in place, so it gets a copy of its own.
        data = command if self.tpm2 else ffi.from_buffer(bytearray(command))
        size = self._response_size
        rc = self._process(self._response, size, self._response_room, data, len(command))
        if rc or self._fault is not None:
            self._check("TPMLIB_Process", rc)
        return _unpack(self._response_chars[0], size[0])

    def cancel(self) -> int:
        """Asks a running command to end early; from any thread; returns the result code."""
        return self._lib.TPMLIB_CancelCommand()

    def hash_start(self) -> int:
        """TPM_IO_Hash_Start; returns the result code. Raises StorageError."""
        self._need_running("TPM_IO_Hash_Start")  # a stopped TPM would crash
        return self._result(self._lib.TPM_IO_Hash_Start())

    def hash_data(self, data: bytes) -> int:
        """TPM_IO_Hash_Data; returns the result code."""
        self._need_running("TPM_IO_Hash_Data")
        return self._result(self._lib.TPM_IO_Hash_Data(data, len(data)))

    def hash_end(self) -> int:
        """TPM_IO_Hash_End; returns the result code."""
        self._need_running("TPM_IO_Hash_End")
        return self._result(self._lib.TPM_IO_Hash_End())

    def established(self) -> bool:
        """The tpmEstablished bit. Raises EngineError."""
        self._need_running("TPM_IO_TpmEstablished_Get")
        bit = ffi.new("TPM_BOOL *")
        self._check("TPM_IO_TpmEstablished_Get", self._lib.TPM_IO_TpmEstablished_Get(bit))
        return bool(bit[0])

    def reset_established(self) -> int:
        """Clears the bit, in the present locality; returns the result code."""
        self._need_running("TPM_IO_TpmEstablished_Reset")
        return self._result(self._lib.TPM_IO_TpmEstablished_Reset())

    def buffer_size(self, wanted: int) -> tuple[int, int, int]:
        """Sets the buffer size in bytes (0 asks only): in use, smallest, largest."""
        smallest, largest = ffi.new("uint32_t *"), ffi.new("uint32_t *")
        in_use = self._lib.TPMLIB_SetBufferSize(wanted, smallest, largest)
        return in_use, smallest[0], largest[0]

    # -- state ----------------------------------------------------------------------------

    def volatile_state(self) -> bytes:
        """The volatile state of the running TPM. Raises EngineError."""
        self._need_running("TPMLIB_VolatileAll_Store")
        buffer, size = ffi.new("unsigned char **"), ffi.new("uint32_t *")
        rc = self._lib.TPMLIB_VolatileAll_Store(buffer, size)
        try:
            self._check("TPMLIB_VolatileAll_Store", rc)
            return ffi.buffer(buffer[0], size[0])[:] if size[0] else b""
        finally:
            self._libc.free(buffer[0])  # OWNER: ours since the return; NULL is fine

    def set_state(self, kind: StateType, data: bytes | None) -> None:
        """State for the next start, None for "explicitly empty". Raises EngineError."""
        self._choose_version()
        buffer = ffi.NULL if data is None else data
        size = 0 if data is None else len(data)
        self._check("TPMLIB_SetState", self._lib.TPMLIB_SetState(kind, buffer, size))

    # -- callbacks ------------------------------------------------------------------------

    def _register_callbacks(self) -> None:
        # A TPM 2 that has nobody to ask is in locality 0, which saves 0.3 of 5 us a command.
        ask = self._locality or not self.tpm2
        self._callbacks.tpm_io_getlocality = self._ask_locality if ask else ffi.NULL
        self._lib.TPMLIB_RegisterCallbacks(self._callbacks)

    def on_load(self, data_at: int, length_at: int, _number: int, name: bytes) -> int:
        """Answers libtpms, which wants a blob."""
        try:
            data = ffi.cast("unsigned char **", data_at)
            length = _cast(_WORDS, length_at)
            data[0], length[0] = ffi.NULL, 0
            blob_name = name.decode()
            blob = self._nvram.load(blob_name)
            # OWNER: libtpms, which frees it with free().
            memory = self._libc.malloc(max(1, len(blob)))
            if not memory:
                raise MemoryError
            ffi.memmove(memory, blob, len(blob))
            data[0], length[0] = ffi.cast("unsigned char *", memory), len(blob)
        except StateMissing:
            return _TPM_RETRY  # the only answer after which libtpms makes a new TPM
        except (StateDamaged, StateKeyRejected) as exc:
            if blob_name == StateType.VOLATILE.blob_name:
                self._volatile_fault = exc
            return self._failed(exc)
        except BaseException as exc:
            return self._failed(exc)
        return 0

    def on_store(self, data_at: int, length: int, _number: int, name: bytes) -> int:
        """Keeps a blob of libtpms."""
        try:
            data = ffi.cast("unsigned char *", data_at)
            self._nvram.store(name.decode(), ffi.buffer(data, length)[:])
        except BaseException as exc:
            return self._failed(exc)
        return 0

    def on_delete(self, _number: int, name: bytes, must_exist: int) -> int:
        """Removes a blob for libtpms."""
        try:
            self._nvram.delete(name.decode(), must_exist=bool(must_exist))
        except BaseException as exc:
            return self._failed(exc)
        return 0

    def on_locality(self, locality_at: int, _number: int) -> int:
        """Tells libtpms the locality of a command."""
        _cast(_WORDS, locality_at)[0] = self._locality
        return 0

    def _failed(self, exc: BaseException) -> int:
        """Keeps the first exception for the outer call; libtpms may call back again."""
        if self._fault is None:
            self._fault = exc
        result = faults.tpm_result(exc)
        return _TPM_FAIL if result in {0, _TPM_RETRY} else result  # RETRY would make a new TPM

    # -- results --------------------------------------------------------------------------

    def _check(self, function: str, rc: int) -> None:
        """The one place where a status becomes an exception."""
        fault, self._fault = self._fault, None
        if fault is not None:
            raise fault
        if rc:
            raise EngineError(function, rc)

    def _result(self, rc: int) -> int:
        """Passes a result code on, unless a callback failed."""
        self._check("", 0)
        return rc

    def _need_running(self, function: str) -> None:
        if not self.running:
            raise EngineError(function, _TPM_FAIL)

    def _choose_version(self) -> None:
        if self.running:
            return
        rc = self._lib.TPMLIB_ChooseTPMVersion(1 if self.tpm2 else 0)
        if rc:
            version = "2" if self.tpm2 else "1.2"
            raise EngineUnavailable(f"Error: TPM {version} is not supported by libtpms.")


# libtpms has one table, and so have we: closures are made once, and never freed.
_served: list[LibtpmsEngine] = []
_ADDRESSES = callbacks.make(
    {
        "tpm_nvram_init": (lambda: 0, ()),
        "tpm_nvram_loaddata": (
            lambda *arguments: _served[0].on_load(*arguments),
            (callbacks.POINTER, callbacks.POINTER, callbacks.WORD, callbacks.TEXT),
        ),
        "tpm_nvram_storedata": (
            lambda *arguments: _served[0].on_store(*arguments),
            (callbacks.POINTER, callbacks.WORD, callbacks.WORD, callbacks.TEXT),
        ),
        "tpm_nvram_deletename": (
            lambda *arguments: _served[0].on_delete(*arguments),
            (callbacks.WORD, callbacks.TEXT, callbacks.FLAG),
        ),
        "tpm_io_init": (lambda: 0, ()),
        "tpm_io_getlocality": (
            lambda at, number: _served[0].on_locality(at, number),
            (callbacks.POINTER, callbacks.WORD),
        ),
    }
)


def _callback_table() -> CData:
    table = ffi.new("struct libtpms_callbacks *")
    table.sizeOfStruct = ffi.sizeof("struct libtpms_callbacks")
    for name, address in _ADDRESSES.items():
        setattr(table, name, ffi.cast(ffi.typeof(getattr(table, name)), address))
    return table


def supported_versions() -> frozenset[str]:
    """Of "1.2" and "2.0", those that the installed libtpms can be."""
    library = _open_library()
    return frozenset(
        name
        for number, name in enumerate(("1.2", "2.0"))
        if library.TPMLIB_ChooseTPMVersion(number) == 0
    )
