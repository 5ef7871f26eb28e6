"""TPM command and response headers, and the few codes a TPM's surroundings need.

Sources: TCG TPM 1.2 Main Part 2 (Structures), TCG TPM 2.0 Library Part 2
(TPM_ST, TPM_CC, TPM_RC) and Part 1, section 18 (command structure).
"""

from enum import IntEnum
from typing import Final

from vtpm_cuse.errors import TpmError, WireError
from vtpm_cuse.wire.layout import BIG, U8, U16, U32, Buffer, WireStruct, wire

TPM_HEADER_SIZE: Final = 10
TPM_BUFFER_MAX: Final = 4096
"""Bytes of a command or response; a TPM 2.0 of libtpms may have more, see `engine.base.Engine`."""
TPM_RESPONSE_MAX: Final = 1 << 14
"""Bytes that a client takes of a TPM that it knows nothing of: more than any has."""
TPM_SEND_COMMAND: Final = 8
"""What `SendCommandHeader` begins with."""


@wire()
class TpmHeader(WireStruct):
    """Header of every command and response, 10 bytes; size counts the header too."""

    tag: U16
    size: U32
    code: U32


@wire()
class SendCommandHeader(WireStruct):
    """Optional head of a TPM 2 command on a socket, 9 bytes; length is not looked at.

    Source: the send-command message of Microsoft's TPM 2.0 simulator protocol.
    """

    command: U32
    locality: U8
    length: U32


class TpmTag(IntEnum):
    """Tags of commands, responses and tickets, TPM 1.2 and 2.0."""

    TPM_TAG_RQU_COMMAND = 0x00C1
    TPM_TAG_RQU_AUTH1_COMMAND = 0x00C2
    TPM_TAG_RQU_AUTH2_COMMAND = 0x00C3
    TPM_TAG_RSP_COMMAND = 0x00C4
    TPM_TAG_RSP_AUTH1_COMMAND = 0x00C5
    TPM_TAG_RSP_AUTH2_COMMAND = 0x00C6
    TPM_ST_NO_SESSIONS = 0x8001
    TPM_ST_SESSIONS = 0x8002
    TPM_ST_HASHCHECK = 0x8024


class TpmOrdinal(IntEnum):
    """TPM 1.2 ordinals (Main Part 2, section 17)."""

    TPM_ORD_OIAP = 0x0A
    TPM_ORD_OSAP = 0x0B
    TPM_ORD_ChangeAuth = 0x0C
    TPM_ORD_TakeOwnership = 0x0D
    TPM_ORD_ChangeAuthAsymStart = 0x0E
    TPM_ORD_ChangeAuthAsymFinish = 0x0F
    TPM_ORD_ChangeAuthOwner = 0x10
    TPM_ORD_DSAP = 0x11
    TPM_ORD_CMK_CreateTicket = 0x12
    TPM_ORD_CMK_CreateKey = 0x13
    TPM_ORD_Extend = 0x14
    TPM_ORD_PcrRead = 0x15
    TPM_ORD_Quote = 0x16
    TPM_ORD_Seal = 0x17
    TPM_ORD_Unseal = 0x18
    TPM_ORD_DirWriteAuth = 0x19
    TPM_ORD_DirRead = 0x1A
    TPM_ORD_CMK_CreateBlob = 0x1B
    TPM_ORD_CMK_SetRestrictions = 0x1C
    TPM_ORD_CMK_ApproveMA = 0x1D
    TPM_ORD_UnBind = 0x1E
    TPM_ORD_CreateWrapKey = 0x1F
    TPM_ORD_LoadKey = 0x20
    TPM_ORD_GetPubKey = 0x21
    TPM_ORD_EvictKey = 0x22
    TPM_ORD_KeyControlOwner = 0x23
    TPM_ORD_CMK_ConvertMigration = 0x24
    TPM_ORD_MigrateKey = 0x25
    TPM_ORD_CreateMigrationBlob = 0x28
    TPM_ORD_DAA_Join = 0x29
    TPM_ORD_ConvertMigrationBlob = 0x2A
    TPM_ORD_AuthorizeMigrationKey = 0x2B
    TPM_ORD_CreateMaintenanceArchive = 0x2C
    TPM_ORD_LoadMaintenanceArchive = 0x2D
    TPM_ORD_KillMaintenanceFeature = 0x2E
    TPM_ORD_LoadManuMaintPub = 0x2F
    TPM_ORD_ReadManuMaintPub = 0x30
    TPM_ORD_DAA_Sign = 0x31
    TPM_ORD_CertifyKey = 0x32
    TPM_ORD_CertifyKey2 = 0x33
    TPM_ORD_Sign = 0x3C
    TPM_ORD_Sealx = 0x3D
    TPM_ORD_Quote2 = 0x3E
    TPM_ORD_SetCapability = 0x3F
    TPM_ORD_ResetLockValue = 0x40
    TPM_ORD_LoadKey2 = 0x41
    TPM_ORD_GetRandom = 0x46
    TPM_ORD_StirRandom = 0x47
    TPM_ORD_SelfTestFull = 0x50
    TPM_ORD_CertifySelfTest = 0x52
    TPM_ORD_ContinueSelfTest = 0x53
    TPM_ORD_GetTestResult = 0x54
    TPM_ORD_Reset = 0x5A
    TPM_ORD_OwnerClear = 0x5B
    TPM_ORD_DisableOwnerClear = 0x5C
    TPM_ORD_ForceClear = 0x5D
    TPM_ORD_DisableForceClear = 0x5E
    TPM_ORD_GetCapabilitySigned = 0x64
    TPM_ORD_GetCapability = 0x65
    TPM_ORD_GetCapabilityOwner = 0x66
    TPM_ORD_OwnerSetDisable = 0x6E
    TPM_ORD_PhysicalEnable = 0x6F
    TPM_ORD_PhysicalDisable = 0x70
    TPM_ORD_SetOwnerInstall = 0x71
    TPM_ORD_PhysicalSetDeactivated = 0x72
    TPM_ORD_SetTempDeactivated = 0x73
    TPM_ORD_SetOperatorAuth = 0x74
    TPM_ORD_SetOwnerPointer = 0x75
    TPM_ORD_CreateEndorsementKeyPair = 0x78
    TPM_ORD_MakeIdentity = 0x79
    TPM_ORD_ActivateIdentity = 0x7A
    TPM_ORD_ReadPubek = 0x7C
    TPM_ORD_OwnerReadPubek = 0x7D
    TPM_ORD_DisablePubekRead = 0x7E
    TPM_ORD_CreateRevocableEK = 0x7F
    TPM_ORD_RevokeTrust = 0x80
    TPM_ORD_OwnerReadInternalPub = 0x81
    TPM_ORD_GetAuditEvent = 0x82
    TPM_ORD_GetAuditEventSigned = 0x83
    TPM_ORD_GetAuditDigest = 0x85
    TPM_ORD_GetAuditDigestSigned = 0x86
    TPM_ORD_GetOrdinalAuditStatus = 0x8C
    TPM_ORD_SetOrdinalAuditStatus = 0x8D
    TPM_ORD_Terminate_Handle = 0x96
    TPM_ORD_Init = 0x97
    TPM_ORD_SaveState = 0x98
    TPM_ORD_Startup = 0x99
    TPM_ORD_SetRedirection = 0x9A
    TPM_ORD_SHA1Start = 0xA0
    TPM_ORD_SHA1Update = 0xA1
    TPM_ORD_SHA1Complete = 0xA2
    TPM_ORD_SHA1CompleteExtend = 0xA3
    TPM_ORD_FieldUpgrade = 0xAA
    TPM_ORD_SaveKeyContext = 0xB4
    TPM_ORD_LoadKeyContext = 0xB5
    TPM_ORD_SaveAuthContext = 0xB6
    TPM_ORD_LoadAuthContext = 0xB7
    TPM_ORD_SaveContext = 0xB8
    TPM_ORD_LoadContext = 0xB9
    TPM_ORD_FlushSpecific = 0xBA
    TPM_ORD_PCR_Reset = 0xC8
    TPM_ORD_NV_DefineSpace = 0xCC
    TPM_ORD_NV_WriteValue = 0xCD
    TPM_ORD_NV_WriteValueAuth = 0xCE
    TPM_ORD_NV_ReadValue = 0xCF
    TPM_ORD_NV_ReadValueAuth = 0xD0
    TPM_ORD_Delegate_UpdateVerification = 0xD1
    TPM_ORD_Delegate_Manage = 0xD2
    TPM_ORD_Delegate_CreateKeyDelegation = 0xD4
    TPM_ORD_Delegate_CreateOwnerDelegation = 0xD5
    TPM_ORD_Delegate_VerifyDelegation = 0xD6
    TPM_ORD_Delegate_LoadOwnerDelegation = 0xD8
    TPM_ORD_Delegate_ReadTable = 0xDB
    TPM_ORD_CreateCounter = 0xDC
    TPM_ORD_IncrementCounter = 0xDD
    TPM_ORD_ReadCounter = 0xDE
    TPM_ORD_ReleaseCounter = 0xDF
    TPM_ORD_ReleaseCounterOwner = 0xE0
    TPM_ORD_EstablishTransport = 0xE6
    TPM_ORD_ExecuteTransport = 0xE7
    TPM_ORD_ReleaseTransportSigned = 0xE8
    TPM_ORD_GetTicks = 0xF1
    TPM_ORD_TickStampBlob = 0xF2
    TSC_ORD_PhysicalPresence = 0x4000000A
    TSC_ORD_ResetEstablishmentBit = 0x4000000B


class TpmCc(IntEnum):
    """TPM 2.0 command codes (Part 2, TPM_CC, of versions 1.59 and 1.83)."""

    TPM_CC_NV_UndefineSpaceSpecial = 0x11F
    TPM_CC_EvictControl = 0x120
    TPM_CC_HierarchyControl = 0x121
    TPM_CC_NV_UndefineSpace = 0x122
    TPM_CC_ChangeEPS = 0x124
    TPM_CC_ChangePPS = 0x125
    TPM_CC_Clear = 0x126
    TPM_CC_ClearControl = 0x127
    TPM_CC_ClockSet = 0x128
    TPM_CC_HierarchyChangeAuth = 0x129
    TPM_CC_NV_DefineSpace = 0x12A
    TPM_CC_PCR_Allocate = 0x12B
    TPM_CC_PCR_SetAuthPolicy = 0x12C
    TPM_CC_PP_Commands = 0x12D
    TPM_CC_SetPrimaryPolicy = 0x12E
    TPM_CC_FieldUpgradeStart = 0x12F
    TPM_CC_ClockRateAdjust = 0x130
    TPM_CC_CreatePrimary = 0x131
    TPM_CC_NV_GlobalWriteLock = 0x132
    TPM_CC_GetCommandAuditDigest = 0x133
    TPM_CC_NV_Increment = 0x134
    TPM_CC_NV_SetBits = 0x135
    TPM_CC_NV_Extend = 0x136
    TPM_CC_NV_Write = 0x137
    TPM_CC_NV_WriteLock = 0x138
    TPM_CC_DictionaryAttackLockReset = 0x139
    TPM_CC_DictionaryAttackParameters = 0x13A
    TPM_CC_NV_ChangeAuth = 0x13B
    TPM_CC_PCR_Event = 0x13C
    TPM_CC_PCR_Reset = 0x13D
    TPM_CC_SequenceComplete = 0x13E
    TPM_CC_SetAlgorithmSet = 0x13F
    TPM_CC_SetCommandCodeAuditStatus = 0x140
    TPM_CC_FieldUpgradeData = 0x141
    TPM_CC_IncrementalSelfTest = 0x142
    TPM_CC_SelfTest = 0x143
    TPM_CC_Startup = 0x144
    TPM_CC_Shutdown = 0x145
    TPM_CC_StirRandom = 0x146
    TPM_CC_ActivateCredential = 0x147
    TPM_CC_Certify = 0x148
    TPM_CC_PolicyNV = 0x149
    TPM_CC_CertifyCreation = 0x14A
    TPM_CC_Duplicate = 0x14B
    TPM_CC_GetTime = 0x14C
    TPM_CC_GetSessionAuditDigest = 0x14D
    TPM_CC_NV_Read = 0x14E
    TPM_CC_NV_ReadLock = 0x14F
    TPM_CC_ObjectChangeAuth = 0x150
    TPM_CC_PolicySecret = 0x151
    TPM_CC_Rewrap = 0x152
    TPM_CC_Create = 0x153
    TPM_CC_ECDH_ZGen = 0x154
    TPM_CC_HMAC = 0x155
    TPM_CC_Import = 0x156
    TPM_CC_Load = 0x157
    TPM_CC_Quote = 0x158
    TPM_CC_RSA_Decrypt = 0x159
    TPM_CC_HMAC_Start = 0x15B
    TPM_CC_SequenceUpdate = 0x15C
    TPM_CC_Sign = 0x15D
    TPM_CC_Unseal = 0x15E
    TPM_CC_PolicySigned = 0x160
    TPM_CC_ContextLoad = 0x161
    TPM_CC_ContextSave = 0x162
    TPM_CC_ECDH_KeyGen = 0x163
    TPM_CC_EncryptDecrypt = 0x164
    TPM_CC_FlushContext = 0x165
    TPM_CC_LoadExternal = 0x167
    TPM_CC_MakeCredential = 0x168
    TPM_CC_NV_ReadPublic = 0x169
    TPM_CC_PolicyAuthorize = 0x16A
    TPM_CC_PolicyAuthValue = 0x16B
    TPM_CC_PolicyCommandCode = 0x16C
    TPM_CC_PolicyCounterTimer = 0x16D
    TPM_CC_PolicyCpHash = 0x16E
    TPM_CC_PolicyLocality = 0x16F
    TPM_CC_PolicyNameHash = 0x170
    TPM_CC_PolicyOR = 0x171
    TPM_CC_PolicyTicket = 0x172
    TPM_CC_ReadPublic = 0x173
    TPM_CC_RSA_Encrypt = 0x174
    TPM_CC_StartAuthSession = 0x176
    TPM_CC_VerifySignature = 0x177
    TPM_CC_ECC_Parameters = 0x178
    TPM_CC_FirmwareRead = 0x179
    TPM_CC_GetCapability = 0x17A
    TPM_CC_GetRandom = 0x17B
    TPM_CC_GetTestResult = 0x17C
    TPM_CC_Hash = 0x17D
    TPM_CC_PCR_Read = 0x17E
    TPM_CC_PolicyPCR = 0x17F
    TPM_CC_PolicyRestart = 0x180
    TPM_CC_ReadClock = 0x181
    TPM_CC_PCR_Extend = 0x182
    TPM_CC_PCR_SetAuthValue = 0x183
    TPM_CC_NV_Certify = 0x184
    TPM_CC_EventSequenceComplete = 0x185
    TPM_CC_HashSequenceStart = 0x186
    TPM_CC_PolicyPhysicalPresence = 0x187
    TPM_CC_PolicyDuplicationSelect = 0x188
    TPM_CC_PolicyGetDigest = 0x189
    TPM_CC_TestParms = 0x18A
    TPM_CC_Commit = 0x18B
    TPM_CC_PolicyPassword = 0x18C
    TPM_CC_ZGen_2Phase = 0x18D
    TPM_CC_EC_Ephemeral = 0x18E
    TPM_CC_PolicyNvWritten = 0x18F
    TPM_CC_PolicyTemplate = 0x190
    TPM_CC_CreateLoaded = 0x191
    TPM_CC_PolicyAuthorizeNV = 0x192
    TPM_CC_EncryptDecrypt2 = 0x193
    TPM_CC_AC_GetCapability = 0x194
    TPM_CC_AC_Send = 0x195
    TPM_CC_Policy_AC_SendSelect = 0x196
    TPM_CC_CertifyX509 = 0x197
    TPM_CC_ACT_SetTimeout = 0x198
    TPM_CC_ECC_Encrypt = 0x199
    TPM_CC_ECC_Decrypt = 0x19A
    TPM_CC_PolicyCapability = 0x19B
    TPM_CC_PolicyParameters = 0x19C
    TPM_CC_NV_DefineSpace2 = 0x19D
    TPM_CC_NV_ReadPublic2 = 0x19E
    TPM_CC_SetCapability = 0x19F
    TPM_CC_ReadOnlyControl = 0x1A0
    TPM_CC_PolicyTransportSPDM = 0x1A1
    TPM_CC_Vendor_TCG_Test = 0x20000000


TPM_CC_SET_LOCALITY: Final = 0x20001000
"""The kernel proxy driver's vendor command, both versions (linux/vtpm_proxy.h)."""


class TpmRc(IntEnum):
    """TPM 1.2 return codes and TPM 2.0 response codes that are made or read here."""

    TPM_SUCCESS = 0
    TPM_FAIL = 0x9
    TPM_BAD_PARAM_SIZE = 0x19
    TPM_FAILEDSELFTEST = 0x1C
    TPM_BAD_LOCALITY = 0x3D
    TPM_RC_INSUFFICIENT = 0x9A
    TPM_RC_INITIALIZE = 0x100
    TPM_RC_FAILURE = 0x101
    TPM_RC_LOCALITY = 0x107
    TPM_RC_COMMAND_SIZE = 0x142
    TPM_RC_COMMAND_CODE = 0x143
    TPM_RC_HANDLE_P1 = 0x1CB
    TPM_RC_INTEGRITY_P1 = 0x1DF
    TPM_RC_VALUE_P2 = 0x2C4
    TPM_RC_SIZE_P2 = 0x2D5
    TPM_RC_CONTEXT_GAP = 0x901
    TPM_RC_OBJECT_MEMORY = 0x902
    TPM_RC_SESSION_MEMORY = 0x903
    TPM_RC_MEMORY = 0x904
    TPM_RC_SESSION_HANDLES = 0x905
    TPM_RC_OBJECT_HANDLES = 0x906
    TPM_RC_REFERENCE_H0 = 0x910
    TPM_RC_REFERENCE_S0 = 0x918
    TPM_RC_RETRY = 0x922


class TpmSu(IntEnum):
    """Startup types of TPM 2.0 (TPM_SU) and TPM 1.2 (TPM_ST)."""

    TPM_SU_CLEAR = 0
    TPM_SU_STATE = 1
    TPM_ST_CLEAR = 1
    TPM_ST_STATE = 2
    TPM_ST_DEACTIVATED = 3


_LONG_ORDINALS = (
    TpmOrdinal.TPM_ORD_TakeOwnership,
    TpmOrdinal.TPM_ORD_CreateWrapKey,
    TpmOrdinal.TPM_ORD_CreateEndorsementKeyPair,
    TpmOrdinal.TPM_ORD_MakeIdentity,
    TpmOrdinal.TPM_ORD_CreateRevocableEK,
    TpmOrdinal.TPM_ORD_SelfTestFull,
    TpmOrdinal.TPM_ORD_ContinueSelfTest,
)
_LONG_CCS = (
    TpmCc.TPM_CC_CreatePrimary,
    TpmCc.TPM_CC_Create,
    TpmCc.TPM_CC_CreateLoaded,
    TpmCc.TPM_CC_SelfTest,
    TpmCc.TPM_CC_IncrementalSelfTest,
)


def long_commands(*, tpm2: bool) -> frozenset[bytes]:
    """The code fields (`command_code`) of commands that may take longer than about 10 ms."""
    codes = _LONG_CCS if tpm2 else _LONG_ORDINALS
    return frozenset(code.to_bytes(4, "big") for code in codes)


_SUCCESS: Final = TpmRc.TPM_SUCCESS.to_bytes(4, "big")


def command_code(command: bytes) -> bytes:
    """The four bytes of the command code, as they are; fewer for a truncated command."""
    return command[6:10]


def command_size(command: bytes | bytearray) -> int:
    """The size that the header of a command or response, which is whole, says it has."""
    return int.from_bytes(command[2:6], "big")


def response(code: int, *, tpm2: bool) -> bytes:
    """A whole response of 10 bytes that carries *code*."""
    tag = TpmTag.TPM_ST_NO_SESSIONS if tpm2 else TpmTag.TPM_TAG_RSP_COMMAND
    return TpmHeader(tag, TPM_HEADER_SIZE, code).pack(BIG)


def succeeded(response: bytes) -> bool:
    """Whether a response, of whatever length, carries TPM_SUCCESS."""
    return response[6:10] == _SUCCESS


def response_code(data: Buffer) -> int:
    """The code of a response. Raises WireError when it is shorter than a header."""
    return TpmHeader.unpack_untrusted(data, BIG).code


def response_body_untrusted(name: str, data: Buffer) -> tuple[int, bytes]:
    """The tag of a successful response to the command *name*, and what follows its header.

    Raises:
        TpmError: The TPM refused *name*.
        WireError: It is no response.
    """
    header = TpmHeader.unpack_untrusted(data, BIG)
    if header.code != TpmRc.TPM_SUCCESS:
        raise TpmError(name, header.code)
    if header.size != len(data):
        raise WireError(f"Response to {name}", header.size, len(data))
    return header.tag, bytes(data[TPM_HEADER_SIZE:])


def _with_u16(tag: TpmTag, code: int, value: int) -> bytes:
    return TpmHeader(tag, TPM_HEADER_SIZE + 2, code).pack(BIG) + value.to_bytes(2, "big")


def startup_command(kind: TpmSu, *, tpm2: bool) -> bytes:
    """TPM_Startup or TPM2_Startup, 12 bytes."""
    if tpm2:
        return _with_u16(TpmTag.TPM_ST_NO_SESSIONS, TpmCc.TPM_CC_Startup, kind)
    return _with_u16(TpmTag.TPM_TAG_RQU_COMMAND, TpmOrdinal.TPM_ORD_Startup, kind)


def self_test_command() -> bytes:
    """TPM2_SelfTest of what has not been tested yet, 11 bytes."""
    header = TpmHeader(TpmTag.TPM_ST_NO_SESSIONS, TPM_HEADER_SIZE + 1, TpmCc.TPM_CC_SelfTest)
    return header.pack(BIG) + b"\0"


def shutdown_command(kind: TpmSu) -> bytes:
    """TPM2_Shutdown, 12 bytes."""
    return _with_u16(TpmTag.TPM_ST_NO_SESSIONS, TpmCc.TPM_CC_Shutdown, kind)
