"""An engine without a TPM: it answers from a script and remembers what it was asked."""

from __future__ import annotations

import struct
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.support.waiting import PATIENCE_SECONDS
from vtpm_cuse.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Callable

    from vtpm_cuse.engine.base import Nvram, StateType

    Answer = bytes | BaseException | Callable[[bytes], bytes]

CANCELED = bytes.fromhex("80010000000a00000909")


def echo(command: bytes) -> bytes:
    """The answer to commands outside the script: success, and the command itself."""
    return struct.pack(">HII", 0x8001, 10 + len(command), 0) + command


@dataclass
class FakeEngine:
    """Implements `engine.base.Engine`.

    Attributes:
        script: Command code to what `process` does with it: bytes are returned,
            an exception is raised, a function is called.
        faults: Name of any other method to the exception it raises.
        results: Name of a method to the result code it returns.
        calls: Names of the calls so far; a command is ``process:CODE`` in hex.
        commands: All commands as they came.
    """

    tpm2: bool = True
    buffer_max: int = 4096
    nvram: Nvram | None = None
    locality: int = 0
    script: dict[int, Answer] = field(default_factory=dict)
    faults: dict[str, BaseException] = field(default_factory=dict)
    results: dict[str, int] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    commands: list[bytes] = field(default_factory=list)
    localities: list[int] = field(default_factory=list)
    hashed: bytearray = field(default_factory=bytearray)
    given: dict[str, bytes | None] = field(default_factory=dict)
    text: str = '{"fake":true}'
    volatile: bytes = b"volatile"
    manufactured: bool = False
    profile: str | None = None
    is_established: bool = False

    def __post_init__(self) -> None:
        self._running = False
        self._size = self.buffer_max
        self._may_go_on = threading.Event()
        self._may_go_on.set()
        self._canceled = False
        self.entered = threading.Event()

    # -- for the test ---------------------------------------------------------------------

    version = (0, 0, 0)
    has_profiles = True

    def set_debug(self, fd: int, level: int, prefix: str) -> None:
        self._called("set_debug")

    def hold(self) -> None:
        """The next command does not end before `release` or `cancel`; `entered` says it runs."""
        self._may_go_on.clear()
        self.entered.clear()
        self._canceled = False

    def release(self) -> None:
        self._may_go_on.set()

    # -- Engine ---------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        return self._running

    def start(self) -> None:
        self._called("start")
        self._running = True

    def stop(self) -> None:
        self._called("stop")
        self._running = False

    def process(self, command: bytes) -> bytes:
        assert isinstance(command, bytes)
        code = int.from_bytes(command[6:10], "big")
        self.calls.append(f"process:{code:x}")
        self.commands.append(command)
        self.localities.append(self.locality)
        self.entered.set()
        assert self._may_go_on.wait(PATIENCE_SECONDS), "nobody released the held command"
        if self._canceled:
            self._canceled = False
            return CANCELED
        answer = self.script.get(code, echo)
        if isinstance(answer, BaseException):
            raise answer
        return answer if isinstance(answer, bytes) else answer(command)

    def cancel(self) -> int:
        self._called("cancel")
        if not self._may_go_on.is_set():
            self._canceled = True
            self._may_go_on.set()
        return self.results.get("cancel", 0 if self.tpm2 else 9)

    def hash_start(self) -> int:
        return self._called("hash_start")

    def hash_data(self, data: bytes) -> int:
        self.hashed += data
        return self._called("hash_data")

    def hash_end(self) -> int:
        return self._called("hash_end")

    def established(self) -> bool:
        self._called("established")
        return self.is_established

    def reset_established(self) -> int:
        self.localities.append(self.locality)
        return self._called("reset_established")

    def buffer_size(self, wanted: int) -> tuple[int, int, int]:
        self._called("buffer_size")
        if wanted:
            self._size = min(max(wanted, 0xAF8), self.buffer_max)
        return self._size, 0xAF8, self.buffer_max

    def volatile_state(self) -> bytes:
        self._called("volatile_state")
        return self.volatile

    def set_state(self, kind: StateType, data: bytes | None) -> None:
        if self._running:
            raise EngineError("TPMLIB_SetState", 0x26)
        self._called("set_state")
        self.given[kind.blob_name] = data

    def info(self, flags: int) -> str:
        self._called("info")
        return self.text

    def set_profile(self, profile: str) -> None:
        self._called("set_profile")
        self.profile = profile

    def was_manufactured(self) -> bool:
        return self.manufactured

    def _called(self, name: str) -> int:
        self.calls.append(name)
        if name in self.faults:
            raise self.faults[name]
        return self.results.get(name, 0)
