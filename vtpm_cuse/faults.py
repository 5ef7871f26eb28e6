"""One table: what an exception is to a TPM client, a PTM requester, a system call, a shell."""

from __future__ import annotations

import errno
from typing import Final

from vtpm_cuse import errors
from vtpm_cuse.wire.ptm import PtmResult

_LIMITS: Final = {
    errno.EMFILE: "raise the limit: 'ulimit -n', or LimitNOFILE= of a unit",
    errno.ENFILE: "the whole system's limit is reached: see fs.file-max",
    errno.ENOMEM: "raise the limit: 'ulimit -v', or LimitAS= of a unit",
}
"""What to do about a limit, by the error that it is seen by."""
_NO_MEMORY: Final = (MemoryError, SystemError)
"""The latter is for a function in C that found no memory and did not say so, in an import mostly."""
_TOO_MANY: Final = "Too many open files"


def tpm_result(exc: BaseException) -> int:
    """The TPM_RESULT that libtpms is given for a failed callback, or a PTM requester."""
    match exc:
        case errors.ResultError() | errors.StateDamaged() | errors.StateKeyRejected():
            return exc.result
        case errors.StateMissing():
            return PtmResult.TPM_RETRY
        case errors.EngineError():
            return exc.rc
        case errors.WireError():
            return PtmResult.TPM_BAD_PARAMETER
        case errors.StateNoRoom() | MemoryError():
            return PtmResult.TPM_SIZE
    return PtmResult.TPM_FAIL


def errno_of(exc: BaseException) -> int:
    """The errno that a system call on the device file fails with."""
    match exc:
        case errors.DeviceError():
            return exc.errno
        case errors.WireError():
            return errno.EINVAL
        case MemoryError():
            return errno.ENOMEM
    return errno.EIO


def sentence(exc: BaseException) -> str:
    """The line about an error, with the cure where a limit of the system was its reason."""
    text = str(exc)
    if isinstance(exc, OSError) and exc.errno in _LIMITS:  # of which no file is the reason
        text = exc.strerror or text
    if isinstance(exc, _NO_MEMORY):
        text = "There is too little memory"
    hint = _limit_hint(exc, text)
    return f"{text}; {hint}" if hint and "ulimit" not in text else text


def _limit_hint(exc: BaseException | None, text: str) -> str:
    if _TOO_MANY in text:  # as the C library says it when it cannot load another
        return _LIMITS[errno.EMFILE]
    while exc is not None:
        if isinstance(exc, _NO_MEMORY):
            return _LIMITS[errno.ENOMEM]
        if isinstance(exc, OSError) and exc.errno in _LIMITS:
            return _LIMITS[exc.errno]
        exc = exc.__cause__
    return ""


def exit_status(exc: BaseException) -> int:
    """The exit status of a program that ends by it."""
    match exc:
        case errors.UsageError():
            return exc.exit_status
        case KeyboardInterrupt():
            return 130  # as a shell reports death by SIGINT
    return 1
