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
    TPM_ST_NO_SESSIONS = 0x8001
    TPM_ST_SESSIONS = 0x8002
    TPM_ST_HASHCHECK = 0x8024


class TpmOrdinal(IntEnum):
    """TPM 1.2 ordinals."""

    TPM_ORD_OIAP = 0x0A
    TPM_ORD_TakeOwnership = 0x0D
    TPM_ORD_PcrRead = 0x15
    TPM_ORD_CreateWrapKey = 0x1F
    TPM_ORD_SelfTestFull = 0x50
    TPM_ORD_ContinueSelfTest = 0x53
    TPM_ORD_GetCapability = 0x65
    TPM_ORD_PhysicalEnable = 0x6F
    TPM_ORD_PhysicalSetDeactivated = 0x72
    TPM_ORD_CreateEndorsementKeyPair = 0x78
    TPM_ORD_MakeIdentity = 0x79
    TPM_ORD_CreateRevocableEK = 0x7F
    TPM_ORD_Startup = 0x99
    TPM_ORD_SHA1Start = 0xA0
    TPM_ORD_SHA1Update = 0xA1
    TPM_ORD_NV_DefineSpace = 0xCC
    TPM_ORD_NV_WriteValue = 0xCD
    TSC_ORD_PhysicalPresence = 0x4000000A


class TpmCc(IntEnum):
    """TPM 2.0 command codes."""

    TPM_CC_EvictControl = 0x120
    TPM_CC_HierarchyChangeAuth = 0x129
    TPM_CC_NV_DefineSpace = 0x12A
    TPM_CC_PCR_Allocate = 0x12B
    TPM_CC_CreatePrimary = 0x131
    TPM_CC_NV_Write = 0x137
    TPM_CC_NV_WriteLock = 0x138
    TPM_CC_IncrementalSelfTest = 0x142
    TPM_CC_SelfTest = 0x143
    TPM_CC_Startup = 0x144
    TPM_CC_Shutdown = 0x145
    TPM_CC_Create = 0x153
    TPM_CC_Sign = 0x15D
    TPM_CC_ContextLoad = 0x161
    TPM_CC_ContextSave = 0x162
    TPM_CC_FlushContext = 0x165
    TPM_CC_StartAuthSession = 0x176
    TPM_CC_GetCapability = 0x17A
    TPM_CC_PCR_Read = 0x17E
    TPM_CC_CreateLoaded = 0x191
    TPM_CC_EncryptDecrypt2 = 0x193


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
    TPM_RC_COMMAND_CODE = 0x143
    TPM_RC_HANDLE_P1 = 0x1CB
    TPM_RC_INTEGRITY_P1 = 0x1DF
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


def command_code(command: bytes) -> bytes:
    """The four bytes of the command code, as they are; fewer for a truncated command."""
    return command[6:10]


def command_size(command: bytes) -> int:
    """The size that the header of a command, which is whole, says the command has."""
    return int.from_bytes(command[2:6], "big")


def response(code: int, *, tpm2: bool) -> bytes:
    """A whole response of 10 bytes that carries *code*."""
    tag = TpmTag.TPM_ST_NO_SESSIONS if tpm2 else TpmTag.TPM_TAG_RSP_COMMAND
    return TpmHeader(tag, TPM_HEADER_SIZE, code).pack(BIG)


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
