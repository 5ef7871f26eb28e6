"""What a BIOS sends to a TPM before it starts anything: the commands, in their order."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from vtpm_cuse.wire import tpm2, tpm12
from vtpm_cuse.wire.tpm import TpmCc, TpmOrdinal, TpmSu, startup_command

if TYPE_CHECKING:
    from collections.abc import Iterator

Startup = Literal["c", "s", "d", "n"]
"""The letter of the option: clear, state, deactivated, none."""

_SECONDS: Final = 20.0
_SELF_TEST_SECONDS: Final = 600.0
_PASSWORD_BYTES: Final = 20
_KEEP_SESSION: Final = 1

_STARTUPS_TPM12: Final = {
    "c": TpmSu.TPM_ST_CLEAR,
    "s": TpmSu.TPM_ST_STATE,
    "d": TpmSu.TPM_ST_DEACTIVATED,
}
_STARTUPS_TPM2: Final = {"c": TpmSu.TPM_SU_CLEAR, "s": TpmSu.TPM_SU_STATE}


class Wanted(NamedTuple):
    """What is to be done.

    Attributes:
        startup: How the TPM is started.
        more: Set physical presence, enable and activate (TPM 1.2).
        self_test: Test it.
        ensure_activated: Say whether a TPM 1.2 needs a reset to be active.
        give_up: Give up physical presence, or the platform's password.
    """

    startup: Startup = "c"
    more: bool = True
    self_test: bool = False
    ensure_activated: bool = False
    give_up: bool = False


class Step(NamedTuple):
    """One command.

    Attributes:
        name: What the message about an error begins with.
        command: The bytes.
        seconds: How long the TPM may take.
        asks_flags: Its answer says whether a TPM 1.2 is deactivated.
        activates: After it, a TPM 1.2 that was deactivated needs a reset.
    """

    name: str
    command: bytes
    seconds: float = _SECONDS
    asks_flags: bool = False
    activates: bool = False


def steps(wanted: Wanted, *, tpm2_: bool) -> Iterator[Step]:
    """The commands for a TPM 2.0 or a TPM 1.2."""
    return _steps_tpm2(wanted) if tpm2_ else _steps_tpm12(wanted)


def _steps_tpm2(wanted: Wanted) -> Iterator[Step]:
    if wanted.startup in _STARTUPS_TPM2:
        kind = _STARTUPS_TPM2[wanted.startup]
        yield Step("TPM2_Startup", startup_command(kind, tpm2=True))
    if wanted.self_test:
        yield Step(
            "TPM2_IncrementalSelfTest",
            tpm2.command(
                TpmCc.TPM_CC_IncrementalSelfTest,
                (),
                tpm2.SelfTestParameters(1, tpm2.TpmAlg.TPM_ALG_SHA256),
            ),
        )
    if wanted.give_up:
        yield Step(
            "TPM2_HierarchyChangeAuth",
            tpm2.command(
                TpmCc.TPM_CC_HierarchyChangeAuth,
                (tpm2.TPM_RH_PLATFORM,),
                tpm2.HierarchyChangeAuthParameters(secrets.token_bytes(_PASSWORD_BYTES)),
                tpm2.PasswordSession(sessionAttributes=_KEEP_SESSION),
            ),
        )


def _steps_tpm12(wanted: Wanted) -> Iterator[Step]:
    if wanted.startup in _STARTUPS_TPM12:
        kind = _STARTUPS_TPM12[wanted.startup]
        yield Step(f"TPM_Startup(0x{kind:02x})", startup_command(kind, tpm2=False))
    if wanted.more:
        yield _presence("CMD_ENABLE", tpm12.TPM_PHYSICAL_PRESENCE_CMD_ENABLE)
        yield _presence("PRESENT", tpm12.TPM_PHYSICAL_PRESENCE_PRESENT)
        if wanted.ensure_activated:
            asked = tpm12.TPM_CAP_FLAG_PERMANENT.to_bytes(4, "big")
            parameters = tpm12.GetCapabilityParameters(tpm12.TPM_CAP_FLAG, asked)
            command = tpm12.command(TpmOrdinal.TPM_ORD_GetCapability, parameters)
            yield Step("TPM_GetCapability()", command, asks_flags=True)
        yield Step("TPM_PhysicalEnable", tpm12.command(TpmOrdinal.TPM_ORD_PhysicalEnable))
        activate = tpm12.command(TpmOrdinal.TPM_ORD_PhysicalSetDeactivated, tpm12.Value8(0))
        yield Step("TPM_PhysicalSetDeactivated", activate, activates=True)
    if wanted.self_test:
        command = tpm12.command(TpmOrdinal.TPM_ORD_ContinueSelfTest)
        yield Step("TPM_ContinueSelfTest", command, _SELF_TEST_SECONDS)
    if wanted.give_up:
        yield _presence("CMD_ENABLE", tpm12.TPM_PHYSICAL_PRESENCE_CMD_ENABLE)
        lock = tpm12.TPM_PHYSICAL_PRESENCE_NOTPRESENT | tpm12.TPM_PHYSICAL_PRESENCE_LOCK
        yield _presence("NOT_PRESENT|LOCK", lock)


def _presence(name: str, value: int) -> Step:
    command = tpm12.command(TpmOrdinal.TSC_ORD_PhysicalPresence, tpm12.Value16(value))
    return Step(f"TSC_PhysicalPresence({name})", command)


def is_deactivated(response: bytes) -> bool:
    """Whether the permanent flags say so. Raises TpmError, WireError."""
    body = tpm12.read_response_untrusted("TPM_GetCapability", response)
    return bool(tpm12.read_permanent_flags_untrusted(body).deactivated)
