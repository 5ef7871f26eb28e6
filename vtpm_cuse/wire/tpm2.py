"""The TPM 2.0 commands that set a TPM up or look at it, and their responses.

Sources: TCG TPM 2.0 Library Part 2 (structures) and Part 3 (commands). Every
authorisation is an empty password: hierarchies of a new TPM have no other.
"""

from enum import IntEnum
from typing import Annotated, Final, NamedTuple

from vtpm_cuse.errors import WireError
from vtpm_cuse.wire.layout import BIG, U8, U16, U32, Buffer
from vtpm_cuse.wire.marshal import ListOf, Reader, Sized8, Sized16, TpmStruct, marshalled
from vtpm_cuse.wire.tpm import (
    TPM_HEADER_SIZE,
    TpmCc,
    TpmHeader,
    TpmTag,
    response_body_untrusted,
)

TPM_RH_OWNER: Final = 0x40000001
TPM_RH_NULL: Final = 0x40000007
TPM_RS_PW: Final = 0x40000009
TPM_RH_ENDORSEMENT: Final = 0x4000000B
TPM_RH_PLATFORM: Final = 0x4000000C

TPM_CAP_PCRS: Final = 5
TPM_CAP_TPM_PROPERTIES: Final = 6
TPM_PT_MANUFACTURER: Final = 0x105
TPM_PT_FIRMWARE_VERSION_1: Final = 0x10B


class TpmAlg(IntEnum):
    """Algorithm identifiers (TPM_ALG_ID); those of hashes by the names of PCR banks."""

    TPM_ALG_RSA = 0x0001
    TPM_ALG_SHA1 = 0x0004
    TPM_ALG_AES = 0x0006
    TPM_ALG_KEYEDHASH = 0x0008
    TPM_ALG_SHA256 = 0x000B
    TPM_ALG_SHA384 = 0x000C
    TPM_ALG_SHA512 = 0x000D
    TPM_ALG_NULL = 0x0010
    TPM_ALG_SM3_256 = 0x0012
    TPM_ALG_RSASSA = 0x0014
    TPM_ALG_RSAPSS = 0x0016
    TPM_ALG_ECDSA = 0x0018
    TPM_ALG_ECC = 0x0023
    TPM_ALG_SYMCIPHER = 0x0025
    TPM_ALG_SHA3_256 = 0x0027
    TPM_ALG_SHA3_384 = 0x0028
    TPM_ALG_SHA3_512 = 0x0029
    TPM_ALG_CFB = 0x0043


class TpmEccCurve(IntEnum):
    """Curves (TPM_ECC_CURVE)."""

    TPM_ECC_NIST_P256 = 0x0003
    TPM_ECC_NIST_P384 = 0x0004
    TPM_ECC_NIST_P521 = 0x0005


class TpmaObject(IntEnum):
    """Attributes of an object (TPMA_OBJECT)."""

    FIXED_TPM = 1 << 1
    FIXED_PARENT = 1 << 4
    SENSITIVE_DATA_ORIGIN = 1 << 5
    USER_WITH_AUTH = 1 << 6
    ADMIN_WITH_POLICY = 1 << 7
    NO_DA = 1 << 10
    RESTRICTED = 1 << 16
    DECRYPT = 1 << 17
    SIGN = 1 << 18


class TpmaNv(IntEnum):
    """Attributes of an NV index (TPMA_NV)."""

    PPWRITE = 1 << 0
    WRITEDEFINE = 1 << 13
    PPREAD = 1 << 16
    OWNERREAD = 1 << 17
    AUTHREAD = 1 << 18
    NO_DA = 1 << 25
    WRITTEN = 1 << 29
    PLATFORMCREATE = 1 << 30


class Symmetric(NamedTuple):
    """Cipher, such as protects a storage key's children: AES in CFB mode, bits of its key."""

    key_bits: int


class _SymmetricCodec:
    """TPMT_SYM_DEF_OBJECT: TPM_ALG_NULL alone, or algorithm, key bits and mode."""

    def write(self, value: Symmetric | None) -> bytes:
        if value is None:
            return TpmAlg.TPM_ALG_NULL.to_bytes(2, "big")
        fields = TpmAlg.TPM_ALG_AES, value.key_bits, TpmAlg.TPM_ALG_CFB
        return b"".join(field.to_bytes(2, "big") for field in fields)

    def read(self, reader: Reader) -> Symmetric | None:
        if reader.number(2) == TpmAlg.TPM_ALG_NULL:
            return None
        value = Symmetric(reader.number(2))
        reader.number(2)
        return value


SymmetricField = Annotated[Symmetric | None, _SymmetricCodec()]


class Scheme(NamedTuple):
    """How a key signs: RSASSA, RSAPSS or ECDSA, and the hash, both as TPM_ALG_ID."""

    algorithm: int
    hash: int


class _SchemeCodec:
    """TPMT_RSA_SCHEME, TPMT_ECC_SCHEME: TPM_ALG_NULL alone, or algorithm and hash."""

    def write(self, value: Scheme | None) -> bytes:
        fields = value or (TpmAlg.TPM_ALG_NULL,)
        return b"".join(field.to_bytes(2, "big") for field in fields)

    def read(self, reader: Reader) -> Scheme | None:
        algorithm = reader.number(2)
        return None if algorithm == TpmAlg.TPM_ALG_NULL else Scheme(algorithm, reader.number(2))


SchemeField = Annotated[Scheme | None, _SchemeCodec()]


@marshalled
class RsaPublic(TpmStruct):
    """TPMT_PUBLIC of an RSA key; an exponent of 0 is 65537, unique is the modulus."""

    type: U16
    nameAlg: U16
    objectAttributes: U32
    authPolicy: Sized16
    symmetric: SymmetricField
    scheme: SchemeField
    keyBits: U16
    exponent: U32
    unique: Sized16


@marshalled
class EccPublic(TpmStruct):
    """TPMT_PUBLIC of an ECC key; x and y are its point."""

    type: U16
    nameAlg: U16
    objectAttributes: U32
    authPolicy: Sized16
    symmetric: SymmetricField
    scheme: SchemeField
    curveID: U16
    kdf: U16
    x: Sized16
    y: Sized16


@marshalled
class KeyedHashPublic(TpmStruct):
    """TPMT_PUBLIC of a key for HMAC of no scheme (TPM_ALG_NULL): who uses it says by which."""

    type: U16
    nameAlg: U16
    objectAttributes: U32
    authPolicy: Sized16
    scheme: U16
    unique: Sized16


@marshalled
class SymCipherPublic(TpmStruct):
    """TPMT_PUBLIC of a key for a cipher."""

    type: U16
    nameAlg: U16
    objectAttributes: U32
    authPolicy: Sized16
    symmetric: SymmetricField
    unique: Sized16


Public = RsaPublic | EccPublic


def read_public_untrusted(data: Buffer) -> Public:
    """A public area as its key type says. Raises WireError, also for other types."""
    kind = Reader(data, "TPMT_PUBLIC").number(2)
    if kind == TpmAlg.TPM_ALG_RSA:
        return RsaPublic.unpack_untrusted(data)
    if kind == TpmAlg.TPM_ALG_ECC:
        return EccPublic.unpack_untrusted(data)
    raise WireError(f"TPMT_PUBLIC of key type 0x{kind:x}", 0, len(data))


@marshalled
class SensitiveCreate(TpmStruct):
    """TPMS_SENSITIVE_CREATE."""

    userAuth: Sized16 = b""
    data: Sized16 = b""


@marshalled
class PcrSelection(TpmStruct):
    """TPMS_PCR_SELECTION: a bank and a bit for each of its PCRs."""

    hash: U16
    select: Sized8


PcrSelections = Annotated[tuple[PcrSelection, ...], ListOf(PcrSelection)]


@marshalled
class CreatePrimaryParameters(TpmStruct):
    """Parameters of TPM2_CreatePrimary and of TPM2_Create."""

    inSensitive: Sized16
    inPublic: Sized16
    outsideInfo: Sized16 = b""
    creationPCR: PcrSelections = ()


@marshalled
class Ticket(TpmStruct):
    """TPMT_TK_CREATION, TPMT_TK_HASHCHECK."""

    tag: U16
    hierarchy: U32
    digest: Sized16


@marshalled
class CreatePrimaryResult(TpmStruct):
    """Response parameters of TPM2_CreatePrimary."""

    outPublic: Sized16
    creationData: Sized16
    creationHash: Sized16
    creationTicket: Ticket
    name: Sized16


@marshalled
class CreateResult(TpmStruct):
    """Response parameters of TPM2_Create."""

    outPrivate: Sized16
    outPublic: Sized16
    creationData: Sized16
    creationHash: Sized16
    creationTicket: Ticket


@marshalled
class LoadParameters(TpmStruct):
    """Parameters of TPM2_Load."""

    inPrivate: Sized16
    inPublic: Sized16


@marshalled
class ReadPublicResult(TpmStruct):
    """Response parameters of TPM2_ReadPublic."""

    outPublic: Sized16
    name: Sized16
    qualifiedName: Sized16


@marshalled
class NvPublic(TpmStruct):
    """TPMS_NV_PUBLIC."""

    nvIndex: U32
    nameAlg: U16
    attributes: U32
    authPolicy: Sized16
    dataSize: U16


@marshalled
class NvDefineParameters(TpmStruct):
    """Parameters of TPM2_NV_DefineSpace."""

    auth: Sized16
    publicInfo: Sized16


@marshalled
class NvWriteParameters(TpmStruct):
    """Parameters of TPM2_NV_Write."""

    data: Sized16
    offset: U16


@marshalled
class NvReadPublicResult(TpmStruct):
    """Response parameters of TPM2_NV_ReadPublic."""

    nvPublic: Sized16
    nvName: Sized16


@marshalled
class NvReadParameters(TpmStruct):
    """Parameters of TPM2_NV_Read."""

    size: U16
    offset: U16


@marshalled
class NvReadResult(TpmStruct):
    """Response parameters of TPM2_NV_Read."""

    data: Sized16


@marshalled
class EvictControlParameters(TpmStruct):
    """Parameters of TPM2_EvictControl."""

    persistentHandle: U32


@marshalled
class GetCapabilityParameters(TpmStruct):
    """Parameters of TPM2_GetCapability."""

    capability: U32
    property: U32
    propertyCount: U32


@marshalled
class PcrCapability(TpmStruct):
    """Response parameters of TPM2_GetCapability(TPM_CAP_PCRS)."""

    moreData: U8
    capability: U32
    assignedPCR: PcrSelections


@marshalled
class TaggedProperty(TpmStruct):
    """TPMS_TAGGED_PROPERTY."""

    property: U32
    value: U32


@marshalled
class PropertyCapability(TpmStruct):
    """Response parameters of TPM2_GetCapability(TPM_CAP_TPM_PROPERTIES)."""

    moreData: U8
    capability: U32
    tpmProperty: Annotated[tuple[TaggedProperty, ...], ListOf(TaggedProperty)]


@marshalled
class PcrReadParameters(TpmStruct):
    """Parameters of TPM2_PCR_Read."""

    pcrSelectionIn: PcrSelections


@marshalled
class Digest(TpmStruct):
    """TPM2B_DIGEST."""

    buffer: Sized16


@marshalled
class PcrReadResult(TpmStruct):
    """Response parameters of TPM2_PCR_Read."""

    pcrUpdateCounter: U32
    pcrSelectionOut: PcrSelections
    pcrValues: Annotated[tuple[Digest, ...], ListOf(Digest)]


@marshalled
class PcrAllocateParameters(TpmStruct):
    """Parameters of TPM2_PCR_Allocate."""

    pcrAllocation: PcrSelections


@marshalled
class PcrAllocateResult(TpmStruct):
    """Response parameters of TPM2_PCR_Allocate."""

    allocationSuccess: U8
    maxPCR: U32
    sizeNeeded: U32
    sizeAvailable: U32


@marshalled
class SignParameters(TpmStruct):
    """Parameters of TPM2_Sign; scheme and its hash are a TPMT_SIG_SCHEME."""

    digest: Sized16
    scheme: U16
    hash: U16
    validation: Ticket


@marshalled
class RsaSignature(TpmStruct):
    """TPMT_SIGNATURE of TPM_ALG_RSASSA."""

    sigAlg: U16
    hash: U16
    sig: Sized16


@marshalled
class EccSignature(TpmStruct):
    """TPMT_SIGNATURE of TPM_ALG_ECDSA."""

    sigAlg: U16
    hash: U16
    signatureR: Sized16
    signatureS: Sized16


@marshalled
class EncryptDecryptParameters(TpmStruct):
    """Parameters of TPM2_EncryptDecrypt2."""

    inData: Sized16
    decrypt: U8
    mode: U16
    ivIn: Sized16


@marshalled
class EncryptDecryptResult(TpmStruct):
    """Response parameters of TPM2_EncryptDecrypt2."""

    outData: Sized16
    ivOut: Sized16


@marshalled
class HierarchyChangeAuthParameters(TpmStruct):
    """Parameters of TPM2_HierarchyChangeAuth."""

    newAuth: Sized16


@marshalled
class SelfTestParameters(TpmStruct):
    """Parameters of TPM2_IncrementalSelfTest for one algorithm."""

    count: U32
    algorithm: U16


@marshalled
class PasswordSession(TpmStruct):
    """TPMS_AUTH_COMMAND; by itself, one with an empty password."""

    sessionHandle: U32 = TPM_RS_PW
    nonce: Sized16 = b""
    sessionAttributes: U8 = 0
    hmac: Sized16 = b""


def command(
    code: TpmCc,
    handles: tuple[int, ...] = (),
    parameters: TpmStruct | None = None,
    session: PasswordSession | None = None,
) -> bytes:
    """A whole command; with *session* as its authorisation, if it needs one."""
    body = b"".join(handle.to_bytes(4, "big") for handle in handles)
    if session is not None:
        authorisation = session.pack()
        body += len(authorisation).to_bytes(4, "big") + authorisation
    if parameters is not None:
        body += parameters.pack()
    tag = TpmTag.TPM_ST_NO_SESSIONS if session is None else TpmTag.TPM_ST_SESSIONS
    return TpmHeader(tag, TPM_HEADER_SIZE + len(body), code).pack(BIG) + body


class Response(NamedTuple):
    """A successful response, cut into its parts."""

    handles: tuple[int, ...]
    parameters: bytes


def read_response_untrusted(name: str, data: Buffer, *, handles: int = 0) -> Response:
    """Cuts a response up.

    Args:
        name: The command's name, for errors.
        data: The response.
        handles: How many handles the command returns.

    Raises:
        TpmError: The TPM refused.
        WireError: It is no response.
    """
    tag, body = response_body_untrusted(name, data)
    reader = Reader(body, f"Response to {name}")
    found = tuple(reader.number(4) for _ in range(handles))
    size = reader.number(4) if tag == TpmTag.TPM_ST_SESSIONS else reader.left
    return Response(found, reader.take(size))
