"""What is asked of a TPM and of an engine, and what an engine asks of its surroundings."""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import Protocol


class StateType(IntEnum):
    """libtpms' state types (TPMLIB_StateType)."""

    PERMANENT = 1
    VOLATILE = 2
    SAVESTATE = 4

    @property
    def blob_name(self) -> str:
        """The name libtpms and the C suite's files use."""
        return {1: "permall", 2: "volatilestate", 4: "savestate"}[self]


class InfoFlag(IntFlag):
    """What `Engine.info` is asked for (TPMLIB_InfoFlags)."""

    SPECIFICATION = 0x01
    ATTRIBUTES = 0x02
    FEATURES = 0x04
    ALGORITHMS = 0x08
    COMMANDS = 0x10
    ACTIVE_PROFILE = 0x20
    AVAILABLE_PROFILES = 0x40
    RUNTIME_ATTRIBUTES = 0x80


class Nvram(Protocol):
    """Where an engine keeps its state; called back in whatever thread runs the command."""

    def load(self, name: str) -> bytes:
        """Returns the blob. Raises StateMissing only when there is none, else StorageError."""

    def store(self, name: str, data: bytes) -> None:
        """Keeps the blob, durably. Raises StorageError."""

    def delete(self, name: str, *, must_exist: bool) -> None:
        """Removes the blob. Raises StorageError."""


class Tpm(Protocol):
    """Something that answers TPM commands: an engine, a chip, a manager, a TPM that is set up.

    All calls from one thread at a time; `cancel` alone may run beside `process`.
    """

    @property
    def tpm2(self) -> bool:
        """Whether it is a TPM 2.0, else a TPM 1.2."""

    def process(self, command: bytes) -> bytes:
        """One command, one response. Raises VtpmError."""

    def cancel(self) -> int:
        """Asks a running command to end early; returns a result code. From any thread."""


class Engine(Tpm, Protocol):
    """A TPM of this process, with its power, its platform's wires and its state."""

    locality: int

    @property
    def buffer_max(self) -> int:
        """Bytes of the longest command that it can be given, and of the longest response."""

    @property
    def version(self) -> tuple[int, int, int]:
        """The library's version: major, minor, micro."""

    @property
    def has_profiles(self) -> bool:
        """Whether `set_profile` works."""

    @property
    def running(self) -> bool:
        """Between `start` and `stop`."""

    def start(self) -> None:
        """Powers the TPM on (TPMLIB_MainInit). Raises StorageError, EngineError."""

    def stop(self) -> None:
        """Powers it off, without a TPM2_Shutdown. Harmless when stopped."""

    def process(self, command: bytes) -> bytes:
        """One command, one response. Raises EngineError; StorageError when a callback failed."""

    def set_debug(self, fd: int, level: int, prefix: str) -> None:
        """Lets the library log to *fd*; level 0 is off."""

    def hash_start(self) -> int:
        """TPM_IO_Hash_Start; returns the result code."""

    def hash_data(self, data: bytes) -> int:
        """TPM_IO_Hash_Data; returns the result code."""

    def hash_end(self) -> int:
        """TPM_IO_Hash_End; returns the result code."""

    def established(self) -> bool:
        """The tpmEstablished bit. Raises EngineError."""

    def reset_established(self) -> int:
        """Clears the bit, in the present locality; returns the result code."""

    def buffer_size(self, wanted: int) -> tuple[int, int, int]:
        """Sets the buffer size in bytes (0 asks only): in use, smallest, largest."""

    def volatile_state(self) -> bytes:
        """The volatile state of the running TPM. Raises EngineError."""

    def set_state(self, kind: StateType, data: bytes | None) -> None:
        """Gives a stopped engine the state for its next start; None means "explicitly empty".

        Raises:
            EngineError: The engine refuses it; then it has dropped all blobs given before.
        """

    def info(self, flags: int) -> str:
        """JSON text (TPMLIB_GetInfo); *flags* are `InfoFlag`, or newer ones of libtpms."""

    def set_profile(self, profile: str) -> None:
        """JSON profile for the next start. Raises EngineUnavailable (libtpms 0.9), EngineError."""

    def was_manufactured(self) -> bool:
        """Whether the last `start` made a new TPM; False where the library cannot tell."""


def rsa_key_sizes(engine: Engine) -> list[int]:
    """Bits of the RSA keys that a TPM 2.0 of this engine can have."""
    import json  # who serves a TPM has no use for it

    found = json.loads(engine.info(InfoFlag.FEATURES))["TPMFeatures"]["RSAKeySizes"]
    return [int(size) for size in found]
