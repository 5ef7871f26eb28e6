"""Names of what TPM commands carry, for people: commands, handles, capabilities, properties.

Sources: TCG TPM 2.0 Library Part 2 (TPM_RH, TPM_HT, TPM_CAP, TPM_PT, TPMA_SESSION) and Part 3
(handles of each command); TCG TPM 1.2 Main Part 2 (TPM_KH, TPM_CAP) and Part 3.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from vtpm_cuse.wire.tpm import TPM_CC_SET_LOCALITY, TpmCc, TpmOrdinal
from vtpm_cuse.wire.tpm2 import TpmAlg


class Shape(NamedTuple):
    """Where a command and its successful response have handles.

    Attributes:
        handles: How many the command begins with.
        returns_handle: The response begins with one.
    """

    handles: int
    returns_handle: bool = False


_NO_HANDLES: Final = """
    FieldUpgradeData IncrementalSelfTest SelfTest Startup Shutdown StirRandom FlushContext
    ECC_Parameters FirmwareRead GetCapability GetRandom GetTestResult Hash PCR_Read ReadClock
    TestParms EC_Ephemeral Vendor_TCG_Test
"""
_TWO_HANDLES: Final = """
    NV_UndefineSpaceSpecial EvictControl NV_UndefineSpace FieldUpgradeStart GetCommandAuditDigest
    NV_Increment NV_SetBits NV_Extend NV_Write NV_WriteLock ActivateCredential Certify
    CertifyCreation Duplicate GetTime NV_Read NV_ReadLock ObjectChangeAuth PolicySecret Rewrap
    PolicySigned EventSequenceComplete CertifyX509
"""
_THREE_HANDLES: Final = "PolicyNV GetSessionAuditDigest NV_Certify PolicyAuthorizeNV AC_Send"
_SHAPES: Final[dict[int, Shape]] = {
    **{int(code): Shape(1) for code in TpmCc},
    **{
        int(TpmCc[f"TPM_CC_{name}"]): Shape(count)
        for count, names in ((0, _NO_HANDLES), (2, _TWO_HANDLES), (3, _THREE_HANDLES))
        for name in names.split()
    },
    TpmCc.TPM_CC_CreatePrimary: Shape(1, returns_handle=True),
    TpmCc.TPM_CC_Load: Shape(1, returns_handle=True),
    TpmCc.TPM_CC_HMAC_Start: Shape(1, returns_handle=True),
    TpmCc.TPM_CC_ContextLoad: Shape(0, returns_handle=True),
    TpmCc.TPM_CC_LoadExternal: Shape(0, returns_handle=True),
    TpmCc.TPM_CC_StartAuthSession: Shape(2, returns_handle=True),
    TpmCc.TPM_CC_HashSequenceStart: Shape(0, returns_handle=True),
    TpmCc.TPM_CC_CreateLoaded: Shape(1, returns_handle=True),
}

_ONE_HANDLE12: Final = """
    ChangeAuth ChangeAuthAsymStart ChangeAuthAsymFinish CMK_CreateKey Quote Seal Unseal
    CMK_CreateBlob UnBind CreateWrapKey GetPubKey EvictKey KeyControlOwner CMK_ConvertMigration
    MigrateKey CreateMigrationBlob DAA_Join ConvertMigrationBlob DAA_Sign Sign Sealx Quote2
    ActivateIdentity GetAuditDigestSigned Terminate_Handle SetRedirection SaveKeyContext
    SaveAuthContext SaveContext FlushSpecific Delegate_CreateKeyDelegation ReleaseTransportSigned
    TickStampBlob OwnerReadInternalPub
"""
_SHAPES12: Final[dict[int, Shape]] = {
    **{int(ordinal): Shape(0) for ordinal in TpmOrdinal},
    **{int(TpmOrdinal[f"TPM_ORD_{name}"]): Shape(1) for name in _ONE_HANDLE12.split()},
    TpmOrdinal.TPM_ORD_CertifyKey: Shape(2),
    TpmOrdinal.TPM_ORD_CertifyKey2: Shape(2),
    TpmOrdinal.TPM_ORD_LoadKey: Shape(1, returns_handle=True),
    TpmOrdinal.TPM_ORD_LoadKey2: Shape(1, returns_handle=True),
    TpmOrdinal.TPM_ORD_OIAP: Shape(0, returns_handle=True),
    TpmOrdinal.TPM_ORD_OSAP: Shape(0, returns_handle=True),
    TpmOrdinal.TPM_ORD_DSAP: Shape(0, returns_handle=True),
    TpmOrdinal.TPM_ORD_LoadKeyContext: Shape(0, returns_handle=True),
    TpmOrdinal.TPM_ORD_LoadAuthContext: Shape(0, returns_handle=True),
    TpmOrdinal.TPM_ORD_LoadContext: Shape(1, returns_handle=True),
    TpmOrdinal.TPM_ORD_EstablishTransport: Shape(1, returns_handle=True),
}

_PERMANENT: Final = {
    0x40000000: "TPM_RH_SRK",
    0x40000001: "TPM_RH_OWNER",
    0x40000002: "TPM_RH_REVOKE",
    0x40000003: "TPM_RH_TRANSPORT",
    0x40000004: "TPM_RH_OPERATOR",
    0x40000005: "TPM_RH_ADMIN",
    0x40000006: "TPM_RH_EK",
    0x40000007: "TPM_RH_NULL",
    0x40000008: "TPM_RH_UNASSIGNED",
    0x40000009: "TPM_RS_PW",
    0x4000000A: "TPM_RH_LOCKOUT",
    0x4000000B: "TPM_RH_ENDORSEMENT",
    0x4000000C: "TPM_RH_PLATFORM",
    0x4000000D: "TPM_RH_PLATFORM_NV",
    **{0x40000010 + number: f"TPM_RH_AUTH_{number:02X}" for number in range(0x100)},
    **{0x40000110 + number: f"TPM_RH_ACT_{number:X}" for number in range(0x10)},
    0x40000140: "TPM_RH_FW_OWNER",
    0x40000141: "TPM_RH_FW_ENDORSEMENT",
    0x40000142: "TPM_RH_FW_PLATFORM",
    0x40000143: "TPM_RH_FW_NULL",
}
_PERMANENT12: Final = {
    0x40000000: "TPM_KH_SRK",
    0x40000001: "TPM_KH_OWNER",
    0x40000002: "TPM_KH_REVOKE",
    0x40000003: "TPM_KH_TRANSPORT",
    0x40000004: "TPM_KH_OPERATOR",
    0x40000005: "TPM_KH_ADMIN",
    0x40000006: "TPM_KH_EK",
}
_PCRS_MAX: Final = 32
_KINDS: Final = {
    0x01: "NV index",
    0x02: "HMAC session",
    0x03: "policy session",
    0x80: "transient",
    0x81: "persistent",
    0x90: "attached component",
}
"""By the top byte of a handle (TPM_HT)."""

_CAPABILITIES: Final = {
    0x000: "TPM_CAP_ALGS",
    0x001: "TPM_CAP_HANDLES",
    0x002: "TPM_CAP_COMMANDS",
    0x003: "TPM_CAP_PP_COMMANDS",
    0x004: "TPM_CAP_AUDIT_COMMANDS",
    0x005: "TPM_CAP_PCRS",
    0x006: "TPM_CAP_TPM_PROPERTIES",
    0x007: "TPM_CAP_PCR_PROPERTIES",
    0x008: "TPM_CAP_ECC_CURVES",
    0x009: "TPM_CAP_AUTH_POLICIES",
    0x00A: "TPM_CAP_ACT",
    0x100: "TPM_CAP_VENDOR_PROPERTY",
}
_CAPABILITIES12: Final = {
    0x01: "TPM_CAP_ORD",
    0x02: "TPM_CAP_ALG",
    0x03: "TPM_CAP_PID",
    0x04: "TPM_CAP_FLAG",
    0x05: "TPM_CAP_PROPERTY",
    0x06: "TPM_CAP_VERSION",
    0x07: "TPM_CAP_KEY_HANDLE",
    0x08: "TPM_CAP_CHECK_LOADED",
    0x09: "TPM_CAP_SYM_MODE",
    0x0C: "TPM_CAP_KEY_STATUS",
    0x0D: "TPM_CAP_NV_LIST",
    0x10: "TPM_CAP_MFR",
    0x11: "TPM_CAP_NV_INDEX",
    0x12: "TPM_CAP_TRANS_ALG",
    0x14: "TPM_CAP_HANDLE",
    0x15: "TPM_CAP_TRANS_ES",
    0x17: "TPM_CAP_AUTH_ENCRYPT",
    0x18: "TPM_CAP_SELECT_SIZE",
    0x19: "TPM_CAP_DA_LOGIC",
    0x1A: "TPM_CAP_VERSION_VAL",
}

_FIXED: Final = """
    FAMILY_INDICATOR LEVEL REVISION DAY_OF_YEAR YEAR MANUFACTURER VENDOR_STRING_1 VENDOR_STRING_2
    VENDOR_STRING_3 VENDOR_STRING_4 VENDOR_TPM_TYPE FIRMWARE_VERSION_1 FIRMWARE_VERSION_2
    INPUT_BUFFER HR_TRANSIENT_MIN HR_PERSISTENT_MIN HR_LOADED_MIN ACTIVE_SESSIONS_MAX PCR_COUNT
    PCR_SELECT_MIN CONTEXT_GAP_MAX - NV_COUNTERS_MAX NV_INDEX_MAX MEMORY CLOCK_UPDATE CONTEXT_HASH
    CONTEXT_SYM CONTEXT_SYM_SIZE ORDERLY_COUNT MAX_COMMAND_SIZE MAX_RESPONSE_SIZE MAX_DIGEST
    MAX_OBJECT_CONTEXT MAX_SESSION_CONTEXT PS_FAMILY_INDICATOR PS_LEVEL PS_REVISION PS_DAY_OF_YEAR
    PS_YEAR SPLIT_MAX TOTAL_COMMANDS LIBRARY_COMMANDS VENDOR_COMMANDS NV_BUFFER_MAX MODES
    MAX_CAP_BUFFER FIRMWARE_SVN FIRMWARE_MAX_SVN
"""
_VARIABLE: Final = """
    PERMANENT STARTUP_CLEAR HR_NV_INDEX HR_LOADED HR_LOADED_AVAIL HR_ACTIVE HR_ACTIVE_AVAIL
    HR_TRANSIENT_AVAIL HR_PERSISTENT HR_PERSISTENT_AVAIL NV_COUNTERS NV_COUNTERS_AVAIL
    ALGORITHM_SET LOADED_CURVES LOCKOUT_COUNTER MAX_AUTH_FAIL LOCKOUT_INTERVAL LOCKOUT_RECOVERY
    NV_WRITE_RECOVERY AUDIT_COUNTER_0 AUDIT_COUNTER_1
"""
_PROPERTIES: Final = {
    first + number: f"TPM_PT_{name}"
    for first, names in ((0x100, _FIXED), (0x200, _VARIABLE))
    for number, name in enumerate(names.split())
    if name != "-"  # nobody has it
}

_SESSION_ATTRIBUTES: Final = {
    0x01: "continueSession",
    0x02: "auditExclusive",
    0x04: "auditReset",
    0x20: "decrypt",
    0x40: "encrypt",
    0x80: "audit",
}


def command_name(code: int, *, tpm12: bool = False) -> str:
    """As Part 3 calls a command: "TPM2_GetRandom", "TPM_OIAP"; in hex where nobody has it."""
    if code == TPM_CC_SET_LOCALITY:
        return "TPM_CC_SET_LOCALITY"
    if code not in (_SHAPES12 if tpm12 else _SHAPES):
        return hexadecimal(code)
    if tpm12:
        return TpmOrdinal(code).name.replace("_ORD_", "_")
    return TpmCc(code).name.replace("TPM_CC_", "TPM2_")


def shape_of(code: int, *, tpm12: bool = False) -> Shape | None:
    """Where the handles of a command are. None for one that nobody knows."""
    return (_SHAPES12 if tpm12 else _SHAPES).get(code)


def handle_name(handle: int, *, tpm12: bool = False) -> str:
    """What a handle is: "TPM_RH_OWNER", "PCR 7", "transient 0x80000000"; hex for any other."""
    table = _PERMANENT12 if tpm12 else _PERMANENT
    if handle in table:
        return table[handle]
    if tpm12:  # where the rest are numbers of the TPM's choice
        return hexadecimal(handle)
    kind = handle >> 24
    if handle < _PCRS_MAX:
        return f"PCR {handle}"
    return f"{_KINDS[kind]} {hexadecimal(handle)}" if kind in _KINDS else hexadecimal(handle)


def is_session(handle: int) -> bool:
    """Whether an authorization of a TPM 2.0 may have this handle."""
    return handle >> 24 in {0x02, 0x03} or handle == 0x40000009


def capability_name(capability: int, *, tpm12: bool = False) -> str:
    """TPM_CAP_*; hex for one that nobody has."""
    table = _CAPABILITIES12 if tpm12 else _CAPABILITIES
    return table.get(capability) or hexadecimal(capability)


def property_name(capability: int, first: int) -> str:
    """What a TPM2_GetCapability of *capability* begins with, by name where that has one."""
    match _CAPABILITIES.get(capability):
        case "TPM_CAP_TPM_PROPERTIES":
            return _PROPERTIES.get(first) or hexadecimal(first)
        case "TPM_CAP_HANDLES":
            return handle_name(first)
        case "TPM_CAP_COMMANDS" | "TPM_CAP_PP_COMMANDS" | "TPM_CAP_AUDIT_COMMANDS":
            return command_name(first)
    return hexadecimal(first)


def bank_name(algorithm: int) -> str:
    """A PCR bank by its hash: "sha256"; hex for no hash."""
    try:
        return TpmAlg(algorithm).name.removeprefix("TPM_ALG_").lower()
    except ValueError:
        return f"0x{algorithm:04x}"


def attribute_names(attributes: int) -> tuple[str, ...]:
    """TPMA_SESSION, bit by bit; reserved ones are "bit N"."""
    return tuple(
        _SESSION_ATTRIBUTES.get(1 << bit) or f"bit {bit}"
        for bit in range(8)
        if attributes >> bit & 1
    )


def hexadecimal(number: int) -> str:
    """A code or handle: 0x and eight digits."""
    return f"0x{number:08x}"
