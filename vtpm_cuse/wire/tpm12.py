"""The TPM 1.2 commands that set a TPM up or look at it, and their responses.

Sources: TCG TPM 1.2 Main Part 2 (structures) and Part 3 (commands).
"""

from typing import Final

from vtpm_cuse.wire.layout import BIG, U8, U16, U32, Buffer
from vtpm_cuse.wire.marshal import Digest20, Reader, Sized16, Sized32, TpmStruct, marshalled
from vtpm_cuse.wire.tpm import (
    TPM_HEADER_SIZE,
    TpmHeader,
    TpmOrdinal,
    TpmTag,
    response_body_untrusted,
)

TPM_ALG_RSA: Final = 1
TPM_ES_RSAESOAEP_SHA1_MGF1: Final = 3
TPM_SS_NONE: Final = 1
TPM_PID_OWNER: Final = 5
TPM_TAG_KEY12: Final = 0x28
TPM_KEY_STORAGE: Final = 0x11
TPM_AUTH_ALWAYS: Final = 1
TPM_TAG_NV_DATA_PUBLIC: Final = 0x18
TPM_TAG_NV_ATTRIBUTES: Final = 0x17
TPM_NV_PER_OWNERREAD: Final = 0x00020000
TPM_NV_PER_OWNERWRITE: Final = 0x00000002
TPM_NV_INDEX_LOCK: Final = 0xFFFFFFFF
TPM_LOC_ALL: Final = 0x1F
TPM_CAP_FLAG: Final = 4
TPM_CAP_PROPERTY: Final = 5
TPM_CAP_VERSION_VAL: Final = 0x1A
TPM_CAP_FLAG_PERMANENT: Final = 0x108
TPM_CAP_PROP_MANUFACTURER: Final = 0x103
TPM_CAP_PROP_TIS_TIMEOUT: Final = 0x115
TPM_CAP_PROP_DURATION: Final = 0x120

TPM_PHYSICAL_PRESENCE_LOCK: Final = 0x4
TPM_PHYSICAL_PRESENCE_PRESENT: Final = 0x8
TPM_PHYSICAL_PRESENCE_NOTPRESENT: Final = 0x10
TPM_PHYSICAL_PRESENCE_CMD_ENABLE: Final = 0x20


@marshalled
class Value8(TpmStruct):
    """One number of a byte."""

    value: U8


@marshalled
class Value16(TpmStruct):
    """One number of two bytes."""

    value: U16


@marshalled
class RsaKeyParms(TpmStruct):
    """TPM_RSA_KEY_PARMS; an empty exponent is 65537."""

    keyLength: U32
    numPrimes: U32
    exponent: Sized32


@marshalled
class KeyParms(TpmStruct):
    """TPM_KEY_PARMS; parms is an `RsaKeyParms`."""

    algorithmID: U32
    encScheme: U16
    sigScheme: U16
    parms: Sized32


@marshalled
class CreateEndorsementKeyPairParameters(TpmStruct):
    """Parameters of TPM_CreateEndorsementKeyPair."""

    antiReplay: Digest20
    keyInfo: KeyParms


@marshalled
class CreateEndorsementKeyPairResult(TpmStruct):
    """Response of TPM_CreateEndorsementKeyPair: a TPM_PUBKEY, whose pubKey is the modulus."""

    algorithmParms: KeyParms
    pubKey: Sized32
    checksum: Digest20


@marshalled
class Key12(TpmStruct):
    """TPM_KEY12."""

    tag: U16
    fill: U16
    keyUsage: U16
    keyFlags: U32
    authDataUsage: U8
    algorithmParms: KeyParms
    PCRInfo: Sized32
    pubKey: Sized32
    encData: Sized32


@marshalled
class OiapResult(TpmStruct):
    """Response of TPM_OIAP."""

    authHandle: U32
    nonceEven: Digest20


@marshalled
class TakeOwnershipParameters(TpmStruct):
    """Parameters of TPM_TakeOwnership, without the authorisation."""

    protocolID: U16
    encOwnerAuth: Sized32
    encSrkAuth: Sized32
    srkParams: Key12


@marshalled
class Authorization1(TpmStruct):
    """The authorisation that ends a command with one session."""

    authHandle: U32
    nonceOdd: Digest20
    continueAuthSession: U8
    authData: Digest20


@marshalled
class PcrInfoShort(TpmStruct):
    """TPM_PCR_INFO_SHORT; pcrSelect has its size in two bytes before its bits."""

    sizeOfSelect: U16
    pcrSelect0: U8
    pcrSelect1: U8
    pcrSelect2: U8
    localityAtRelease: U8
    digestAtRelease: Digest20


@marshalled
class NvDefineParameters(TpmStruct):
    """Parameters of TPM_NV_DefineSpace: a TPM_NV_DATA_PUBLIC and the area's auth value."""

    tag: U16
    nvIndex: U32
    pcrInfoRead: PcrInfoShort
    pcrInfoWrite: PcrInfoShort
    attributesTag: U16
    attributes: U32
    bReadSTClear: U8
    bWriteSTClear: U8
    bWriteDefine: U8
    dataSize: U32
    encAuth: Digest20


@marshalled
class NvWriteParameters(TpmStruct):
    """Parameters of TPM_NV_WriteValue."""

    nvIndex: U32
    offset: U32
    data: Sized32


@marshalled
class GetCapabilityParameters(TpmStruct):
    """Parameters of TPM_GetCapability."""

    capArea: U32
    subCap: Sized32


@marshalled
class GetCapabilityResult(TpmStruct):
    """Response parameters of TPM_GetCapability."""

    resp: Sized32


@marshalled
class VersionInfo(TpmStruct):
    """TPM_CAP_VERSION_INFO, whose vendor's part is *vendorSpecific*."""

    tag: U16
    major: U8
    minor: U8
    revMajor: U8
    revMinor: U8
    specLevel: U16
    errataRev: U8
    tpmVendorID: U32
    vendorSpecific: Sized16


@marshalled
class PcrReadParameters(TpmStruct):
    """Parameters of TPM_PcrRead."""

    pcrIndex: U32


@marshalled
class PcrReadResult(TpmStruct):
    """Response parameters of TPM_PcrRead."""

    outDigest: Digest20


@marshalled
class PermanentFlags(TpmStruct):
    """The head of TPM_PERMANENT_FLAGS, as far as it is looked at here."""

    tag: U16
    disable: U8
    ownership: U8
    deactivated: U8


def read_permanent_flags_untrusted(body: bytes) -> PermanentFlags:
    """The flags in the *body* of a response to TPM_GetCapability. Raises WireError."""
    flags = GetCapabilityResult.unpack_untrusted(body).resp
    return PermanentFlags.read(Reader(flags, "TPM_PERMANENT_FLAGS"))


def command(
    ordinal: TpmOrdinal, parameters: TpmStruct | None = None, auth: Authorization1 | None = None
) -> bytes:
    """A whole command."""
    body = b"" if parameters is None else parameters.pack()
    tag = TpmTag.TPM_TAG_RQU_COMMAND
    if auth is not None:
        body += auth.pack()
        tag = TpmTag.TPM_TAG_RQU_AUTH1_COMMAND
    return TpmHeader(tag, TPM_HEADER_SIZE + len(body), ordinal).pack(BIG) + body


def read_response_untrusted(name: str, data: Buffer) -> bytes:
    """What follows the header of a successful response. Raises TpmError, WireError."""
    return response_body_untrusted(name, data)[1]
