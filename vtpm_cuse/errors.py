"""The exception tree. Classes carry data; ``__str__`` builds the sentence once.

Which TPM response code, PTM result, errno or exit status a class becomes is
`vtpm_cuse.faults`' business alone.
"""

from __future__ import annotations

import re
from typing import Final, Literal

NO_PROC: Final = "/proc is not mounted", "mount -t proc proc /proc"
"""Why much cannot be found out about this process, and the command that mends it."""
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def shown(text: str) -> str:
    """Text that may be somebody else's, for a terminal, which obeys control characters.

    They are written as JSON has them; newline and tab stay.
    """
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


class VtpmError(Exception):
    """Everything this package raises on purpose."""


class WireError(VtpmError):
    """Bytes do not fit the layout: ``what`` needed ``need`` bytes and got ``got``."""

    def __init__(self, what: str, need: int, got: int) -> None:
        super().__init__(what, need, got)
        self.what, self.need, self.got = what, need, got

    def __str__(self) -> str:
        return f"{self.what}: {self.need} bytes needed, {self.got} there"


class MessageError(VtpmError):
    """A varlink peer sends what is no message; there is no going on with it."""


class VarlinkError(VtpmError):
    """A varlink call fails: ``name`` is the error's, with its interface, ``parameters`` JSON's."""

    def __init__(self, name: str, parameters: dict[str, object]) -> None:
        super().__init__(name, parameters)
        self.name, self.parameters = name, parameters

    def __str__(self) -> str:
        details = ", ".join(f"{name} {value}" for name, value in self.parameters.items())
        return f"{self.name}: {details}" if details else self.name


class ResultError(VtpmError):
    """What failed has ``result``, a TPM_RESULT as PTM requests have it."""

    def __init__(self, result: int, reason: str = "") -> None:
        super().__init__(result, reason)
        self.result, self.reason = result, reason

    def __str__(self) -> str:
        return self.reason or f"request failed with result 0x{self.result:x}"


class PtmError(ResultError):
    """A PTM request, or a start, cannot be fulfilled: ``result`` is what a requester is answered."""


class BlobError(ResultError):
    """A blob or table fails a check: ``result`` is the C suite's code for that check."""


class AnswerError(ResultError):
    """A running vTPM that a client asked answers ``result``, or what no vTPM answers."""


class TpmUnavailable(ResultError):
    """The TPM does not start, or its state is another process' by now; the log has said why."""


class TpmError(VtpmError):
    """The TPM refused ``command`` with the response code ``code``."""

    def __init__(self, command: str, code: int) -> None:
        super().__init__(command, code)
        self.command, self.code = command, code

    def __str__(self) -> str:
        return f"{self.command} failed: 0x{self.code:x}"


class DeviceError(VtpmError):
    """A system call on the device file fails with ``errno``."""

    def __init__(self, errno: int) -> None:
        super().__init__(errno)
        self.errno = errno


class EngineError(VtpmError):
    """libtpms said no: ``function`` returned ``rc`` (TPM 1.2 or TPM 2.0 code)."""

    def __init__(self, function: str, rc: int) -> None:
        super().__init__(function, rc)
        self.function, self.rc = function, rc

    def __str__(self) -> str:
        return f"{self.function} failed: 0x{self.rc:x}"


class EngineUnavailable(VtpmError):
    """libtpms is missing, or lacks ``feature``."""

    def __init__(self, feature: str, hint: str = "") -> None:
        super().__init__(feature, hint)
        self.feature, self.hint = feature, hint

    def __str__(self) -> str:
        return f"{self.feature}; {self.hint}" if self.hint else self.feature


class StorageError(VtpmError):
    """State could not be read or written; ``path`` is the file at fault."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class StateMissing(StorageError):
    """There is no such blob. The only error that may lead to a new TPM."""


class StateLocked(StorageError):
    """Another process holds the state."""


class StateNoRoom(StorageError):
    """What keeps the state is too small for the new one; the old one is still there."""


class StateDamaged(StorageError):
    """A blob fails a check; ``result`` is the C suite's code for that check."""

    def __init__(self, path: str, reason: str, result: int) -> None:
        super().__init__(path, reason)
        self.args = (path, reason, result)
        self.result = result


class StateKeyRejected(StorageError):
    """A blob is encrypted and the key for it is missing or wrong."""

    def __init__(self, path: str, reason: str, result: int) -> None:
        super().__init__(path, reason)
        self.args = (path, reason, result)
        self.result = result


class CertificateError(VtpmError):
    """No certificate can be made; ``place`` is the file, option or key at fault."""

    def __init__(self, place: str, reason: str) -> None:
        super().__init__(place, reason)
        self.place, self.reason = place, reason

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


class FrontendError(VtpmError):
    """A device node or channel cannot be had; ``hint`` says what to do."""

    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(reason, hint)
        self.reason, self.hint = reason, hint

    def __str__(self) -> str:
        return f"{self.reason}; {self.hint}" if self.hint else self.reason


class DeviceGone(FrontendError):
    """The device that was served is no more: unmounted, or taken away by the kernel."""


class UsageError(VtpmError):
    """The caller can fix it: one line, no traceback, ``exit_status``."""

    def __init__(self, reason: str, exit_status: int = 1, hint: str = "") -> None:
        super().__init__(reason, exit_status, hint)
        self.reason, self.exit_status, self.hint = reason, exit_status, hint

    def __str__(self) -> str:
        return f"{self.reason}; {self.hint}" if self.hint else self.reason


class LabError(VtpmError):
    """A private TPM cannot be had, or has gone; ``said`` is what its emulator said last.

    The sentence has the last line of that, and a traceback all of it.
    """

    def __init__(self, reason: str, said: str = "") -> None:
        super().__init__(reason, said)
        self.reason, self.said = reason, said
        if "\n" in said:
            self.add_note(said)

    def __str__(self) -> str:
        last = self.said.rpartition("\n")[2]
        return f"{self.reason}: {last}" if last else self.reason


class ChannelError(VtpmError):
    """Who is at the other end of a channel between our own processes says what none of them does."""


FleetFault = Literal[
    "NoSuchTpm",
    "TpmExists",
    "Busy",
    "NotOwner",
    "StateDamaged",
    "KeyRejected",
    "OverLimit",
    "BadName",
]


class FleetError(VtpmError):
    """The manager cannot do that to the TPM ``tpm``: ``fault`` is the error's name on varlink."""

    def __init__(self, fault: FleetFault, tpm: str, reason: str) -> None:
        super().__init__(fault, tpm, reason)
        self.fault, self.tpm, self.reason = fault, tpm, reason

    def __str__(self) -> str:
        return f"{self.tpm}: {self.reason}"
