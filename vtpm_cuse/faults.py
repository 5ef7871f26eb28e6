"""One table: what an exception is to a TPM client, a PTM requester, a system call, a shell."""

from __future__ import annotations

import errno

from vtpm_cuse import errors
from vtpm_cuse.wire.ptm import PtmResult


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


def exit_status(exc: BaseException) -> int:
    """The exit status of a program that ends by it."""
    match exc:
        case errors.UsageError():
            return exc.exit_status
        case KeyboardInterrupt():
            return 130  # as a shell reports death by SIGINT
    return 1
