"""A TPM behind a device: a chip's or another one of the kernel's, or one of another program's.

It is borrowed: its power, its locality and its state are others' business, and all that an engine
does with these is refused. Used from one thread, which waits in the kernel while a command runs.
"""

from __future__ import annotations

import errno
import logging
import os
import select
from typing import TYPE_CHECKING, Final, NoReturn

from vtpm_cuse.errors import DeviceGone, EngineError, FrontendError
from vtpm_cuse.wire import tpm2_handles
from vtpm_cuse.wire.tpm import (
    TPM_BUFFER_MAX,
    TPM_HEADER_SIZE,
    TpmCc,
    TpmRc,
    TpmTag,
    command_code,
    command_size,
)

if TYPE_CHECKING:
    from vtpm_cuse.engine.base import StateType

log = logging.getLogger(__name__)

_FIRST_SECONDS: Final = 60.0
"""For the first answer: until then no signal ends the program in order."""

_NO_DEVICE: Final = frozenset(
    {errno.ENODEV, errno.ENXIO, errno.EPIPE, errno.ESHUTDOWN, errno.EBADF}
    | {errno.ENOTCONN, errno.ECONNABORTED}  # a FUSE file or CUSE device whose server has ended
)
_TAGS: Final = frozenset(
    tag.to_bytes(2, "big") for tag in (TpmTag.TPM_ST_NO_SESSIONS, TpmTag.TPM_ST_SESSIONS)
)
_OLD_TAG: Final = TpmTag.TPM_TAG_RSP_COMMAND.to_bytes(2, "big")
_FAILURE: Final = 0x000B_0000 | TpmRc.TPM_RC_FAILURE
"""In the layer of a resource manager: no TPM has said so."""
_NO_POWER: Final = 0x09
"""TPM_FAIL, as libtpms says it of what it does not do."""


class Chip:
    """Implements `engine.base.Engine` on a descriptor.

    Args:
        fd: Of the device, blocking; taken over.
        path: What messages call it.
    """

    tpm2 = True
    locality = 0
    buffer_max = TPM_BUFFER_MAX  # the kernel's
    version = (0, 0, 0)
    has_profiles = False

    def __init__(self, fd: int, path: str) -> None:
        self._fd, self._path = fd, path
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)
        self._command_max = self.buffer_max
        self.running = False

    def start(self) -> None:
        """Sees that it is a TPM 2.0, and how long its commands may be.

        Raises:
            FrontendError: It does not answer, or is none.
            DeviceGone: It is not there any more.
        """
        question = tpm2_handles.get_capability(
            tpm2_handles.TPM_CAP_TPM_PROPERTIES, tpm2_handles.TPM_PT_MAX_COMMAND_SIZE, 1
        )
        try:
            answer = self._exchange(question, _FIRST_SECONDS)
        except OSError as exc:
            reason = f"{self._path} takes no command: {exc.strerror}"
            raise FrontendError(reason, "is it a TPM device?") from exc
        if answer[:2] == _OLD_TAG:
            raise FrontendError(f"{self._path} is a TPM 1.2", "a resource manager needs a TPM 2.0")
        if not _is_response(answer):
            raise FrontendError(f"{self._path} does not answer as a TPM", "is it a TPM device?")
        found = tpm2_handles.CapabilityList.of(answer, 2)
        if found is not None and found.words[:1] == (tpm2_handles.TPM_PT_MAX_COMMAND_SIZE,):
            self._command_max = min(found.words[1], self.buffer_max)
        self.running = True

    def stop(self) -> None:
        """Lets it be, and closes it, as another program may want it. Again is harmless."""
        self.running = False
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def process(self, command: bytes) -> bytes:
        """One command, one response; where the device gives none, one in the manager's layer.

        Raises:
            DeviceGone: It is not there any more.
        """
        if len(command) > self._command_max:  # the device would cut it, or end the transfer
            return tpm2_handles.plain_response(TpmRc.TPM_RC_COMMAND_SIZE)
        try:
            answer = self._exchange(command)
        except OSError as exc:
            log.error("The TPM at %s refused a command: %s", self._path, exc.strerror)
            if exc.errno == errno.ENOMEM:  # the kernel's own manager has no place left
                return tpm2_handles.plain_response(_no_room_for(command))
            return tpm2_handles.plain_response(_FAILURE)
        if _is_response(answer):
            return answer
        begin = answer[:TPM_HEADER_SIZE].hex()
        log.error("The TPM at %s answered nonsense, which begins with %s", self._path, begin)
        return tpm2_handles.plain_response(_FAILURE)

    def _exchange(self, command: bytes, seconds: float | None = None) -> bytes:
        """Raises DeviceGone; OSError where it refuses the command, or takes longer than that."""
        try:
            os.write(self._fd, command)
            if not self._poll.poll(None if seconds is None else seconds * 1000):
                raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
            answer = os.read(self._fd, self.buffer_max)
        except OSError as exc:
            if exc.errno in _NO_DEVICE:
                raise self._gone(exc.strerror or "") from exc
            raise
        if not answer:
            raise self._gone("it answers nothing")
        return answer

    def _gone(self, why: str) -> DeviceGone:
        return DeviceGone(
            f"The TPM at {self._path} has gone away: {why}", "start this again when it is back"
        )

    def cancel(self) -> int:
        """No device of the kernel's can be told to end a command of a TPM 2.0."""
        return _NO_POWER

    # -- what is not its borrower's -------------------------------------------------------

    def set_debug(self, fd: int, level: int, prefix: str) -> None:
        """It has no log."""

    def hash_start(self) -> int:
        """Refused: the platform's."""
        return _NO_POWER

    def hash_data(self, data: bytes) -> int:
        """Refused: the platform's."""
        _ = data
        return _NO_POWER

    def hash_end(self) -> int:
        """Refused: the platform's."""
        return _NO_POWER

    def established(self) -> bool:
        """Nobody can tell. Raises EngineError."""
        self._refuse("established")

    def reset_established(self) -> int:
        """Refused: the platform's."""
        return _NO_POWER

    def buffer_size(self, wanted: int) -> tuple[int, int, int]:
        """It stays as it is: in use, smallest, largest, in bytes."""
        _ = wanted
        return (self._command_max,) * 3

    def volatile_state(self) -> bytes:
        """It does not leave the chip. Raises EngineError."""
        self._refuse("volatile_state")

    def set_state(self, kind: StateType, data: bytes | None) -> None:
        """None goes into the chip. Raises EngineError."""
        _ = kind, data
        self._refuse("set_state")

    def info(self, flags: int) -> str:
        """Its commands tell it. Raises EngineError."""
        _ = flags
        self._refuse("info")

    def set_profile(self, profile: str) -> None:
        """It has none. Raises EngineError."""
        _ = profile
        self._refuse("set_profile")

    def was_manufactured(self) -> bool:
        """Not here."""
        return False

    @staticmethod
    def _refuse(what: str) -> NoReturn:
        raise EngineError(what, _NO_POWER)


def _is_response(answer: bytes) -> bool:
    whole = len(answer) >= TPM_HEADER_SIZE and command_size(answer) == len(answer)
    # To what it does not take for a command a TPM 2.0 may answer as a TPM 1.2 does.
    return whole and (answer[:2] in _TAGS or answer[:2] == _OLD_TAG)


def _no_room_for(command: bytes) -> TpmRc:
    starts = command_code(command) == TpmCc.TPM_CC_StartAuthSession.to_bytes(4, "big")
    return TpmRc.TPM_RC_SESSION_MEMORY if starts else TpmRc.TPM_RC_OBJECT_MEMORY
