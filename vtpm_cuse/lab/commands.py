"""The TPM commands that a private TPM sends on its own behalf. Pure.

Sources: TCG TPM 2.0 Library Part 3, TPM2_PCR_Read, TPM2_CreatePrimary, TPM2_Unseal, TPM2_ReadClock,
TPM2_ClockSet, TPM2_FlushContext; TCG TPM 1.2 Main Part 3, TPM_PcrRead.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from vtpm_cuse.errors import LabError
from vtpm_cuse.wire import tpm2, tpm12
from vtpm_cuse.wire.layout import BIG
from vtpm_cuse.wire.tpm import TPM_HEADER_SIZE, TpmCc, TpmHeader, TpmOrdinal, TpmRc, TpmTag
from vtpm_cuse.wire.tpm2 import TPM_RH_NULL, TPM_RH_PLATFORM, PasswordSession, TpmAlg, TpmaObject

if TYPE_CHECKING:
    from collections.abc import Callable

TPM_RC_LOCKOUT: Final = 0x921
_AUTH_FAIL: Final = 0x98E  # TPM_RC_AUTH_FAIL of the first session

_TPM_CC_ClockSet: Final = 0x128
_TPM_CC_Unseal: Final = 0x15E
_TPM_CC_ReadClock: Final = 0x181
_PCRS: Final = 24
_FAILURES_MAX: Final = 1000
"""More tries than any dictionary attack protection allows that lets somebody in."""


def _command(code: int, body: bytes, *, sessions: bool) -> bytes:
    tag = TpmTag.TPM_ST_SESSIONS if sessions else TpmTag.TPM_ST_NO_SESSIONS
    return TpmHeader(tag, TPM_HEADER_SIZE + len(body), code).pack(BIG) + body


def _authorized(code: int, handle: int, parameters: bytes = b"", password: bytes = b"") -> bytes:
    area = PasswordSession(hmac=password).pack()
    head = struct.pack(">II", handle, len(area))
    return _command(code, head + area + parameters, sessions=True)


def bank_of(name: str) -> TpmAlg:
    """The hash algorithm of a PCR bank, by its name as "sha256". Raises LabError."""
    try:
        return TpmAlg[f"TPM_ALG_{name.upper().replace('-', '_')}"]
    except KeyError:
        raise LabError(f"There is no PCR bank {name}") from None


def read_pcr(ask: Callable[[bytes], bytes], number: int, bank: str) -> bytes:
    """The value of a PCR of a TPM 2.0. Raises LabError where there is none, TpmError, WireError."""
    algorithm = bank_of(bank)
    _check_pcr(number)
    select = (1 << number).to_bytes(_PCRS // 8, "little")
    wanted = tpm2.PcrReadParameters((tpm2.PcrSelection(algorithm, select),))
    answer = ask(tpm2.command(TpmCc.TPM_CC_PCR_Read, parameters=wanted))
    body = tpm2.read_response_untrusted("TPM2_PCR_Read", answer).parameters
    found = tpm2.PcrReadResult.unpack_untrusted(body).pcrValues
    if not found:
        raise LabError(f"The PCR bank {bank} is not active")
    return bytes(found[0].buffer)


def read_pcr12(ask: Callable[[bytes], bytes], number: int) -> bytes:
    """The value of a PCR of a TPM 1.2, of SHA-1. Raises LabError, TpmError, WireError."""
    _check_pcr(number)
    answer = ask(tpm12.command(TpmOrdinal.TPM_ORD_PcrRead, tpm12.PcrReadParameters(number)))
    body = tpm12.read_response_untrusted("TPM_PcrRead", answer)
    return bytes(tpm12.PcrReadResult.unpack_untrusted(body).outDigest)


def _check_pcr(number: int) -> None:
    if not 0 <= number < _PCRS:
        raise LabError(f"There is no PCR {number}: they are 0 to {_PCRS - 1}")


def step_clock(ask: Callable[[bytes], bytes], milliseconds: int) -> None:
    """Sets the clock of a TPM 2.0 forward, which never goes back. Raises LabError, TpmError, WireError."""
    answer = ask(_command(_TPM_CC_ReadClock, b"", sessions=False))
    body = tpm2.read_response_untrusted("TPM2_ReadClock", answer).parameters
    _, clock = struct.unpack_from(">QQ", body)
    if clock + milliseconds >= 1 << 64:
        raise LabError("No clock goes so far")
    new = struct.pack(">Q", clock + milliseconds)
    answer = ask(_authorized(_TPM_CC_ClockSet, TPM_RH_PLATFORM, new))
    tpm2.read_response_untrusted("TPM2_ClockSet", answer)


def lock_out(ask: Callable[[bytes], bytes]) -> None:
    """Gives wrong passwords until the TPM takes none any more. Raises LabError, TpmError, WireError.

    For a secret below the null hierarchy, which needs nobody's password.
    """
    attributes = TpmaObject.USER_WITH_AUTH | TpmaObject.FIXED_TPM | TpmaObject.FIXED_PARENT
    algorithms = TpmAlg.TPM_ALG_KEYEDHASH, TpmAlg.TPM_ALG_SHA256
    public = tpm2.KeyedHashPublic(*algorithms, attributes, b"", TpmAlg.TPM_ALG_NULL, b"")
    secret = tpm2.SensitiveCreate(b"right", b"secret")
    parameters = tpm2.CreatePrimaryParameters(secret.pack(), public.pack())
    create = tpm2.command(
        TpmCc.TPM_CC_CreatePrimary, (TPM_RH_NULL,), parameters, session=PasswordSession()
    )
    made = tpm2.read_response_untrusted("TPM2_CreatePrimary", ask(create), handles=1)
    (handle,) = made.handles
    try:
        unseal = _authorized(_TPM_CC_Unseal, handle, password=b"wrong")
        for _ in range(_FAILURES_MAX):
            code = TpmHeader.unpack_untrusted(ask(unseal), BIG).code
            if code == TPM_RC_LOCKOUT:
                return
            if code not in {_AUTH_FAIL, TpmRc.TPM_RC_RETRY}:  # the first one has it note that
                raise LabError(f"The TPM answered a wrong password with 0x{code:x}")
        raise LabError(f"The TPM is not locked out after {_FAILURES_MAX} wrong passwords")
    finally:
        ask(tpm2.command(TpmCc.TPM_CC_FlushContext, (handle,)))
