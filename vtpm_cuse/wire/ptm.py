"""PTM requests and responses: ioctl arguments and control channel messages in one table.

Each structure is declared once. As an ioctl argument it is host-endian, request
and response share one union, and the command's number carries the union's size.
On the control channel it is big-endian and only the filled part travels; the
control command is the ioctl number plus one. Source: the C suite's public
header tpm_ioctl.h; the two requests about the resource manager's clients are ours.
"""

from enum import IntEnum, IntFlag
from typing import Final, NamedTuple

from vtpm_cuse.wire.layout import U8, U32, U64, Tail, WireStruct, wire

PTM_HASH_DATA_SIZE: Final = 4096
PTM_STATE_BLOB_SIZE: Final = 3072
PTM_INFO_SIZE: Final = 3072


class PtmCommand(IntEnum):
    """The ioctl number; the control channel's command is one more."""

    PTM_GET_CAPABILITY = 0
    PTM_INIT = 1
    PTM_SHUTDOWN = 2
    PTM_GET_TPMESTABLISHED = 3
    PTM_SET_LOCALITY = 4
    PTM_HASH_START = 5
    PTM_HASH_DATA = 6
    PTM_HASH_END = 7
    PTM_CANCEL_TPM_CMD = 8
    PTM_STORE_VOLATILE = 9
    PTM_RESET_TPMESTABLISHED = 10
    PTM_GET_STATEBLOB = 11
    PTM_SET_STATEBLOB = 12
    PTM_STOP = 13
    PTM_GET_CONFIG = 14
    PTM_SET_DATAFD = 15
    PTM_SET_BUFFERSIZE = 16
    PTM_GET_INFO = 17
    PTM_LOCK_STORAGE = 18
    PTM_GET_CLIENTS = 64  # from here on ours, far from what the C suite may come to have
    PTM_FLUSH_CLIENT = 65


class PtmCapability(IntFlag):
    """Answer of PTM_GET_CAPABILITY."""

    PTM_CAP_INIT = 1
    PTM_CAP_SHUTDOWN = 1 << 1
    PTM_CAP_GET_TPMESTABLISHED = 1 << 2
    PTM_CAP_SET_LOCALITY = 1 << 3
    PTM_CAP_HASHING = 1 << 4
    PTM_CAP_CANCEL_TPM_CMD = 1 << 5
    PTM_CAP_STORE_VOLATILE = 1 << 6
    PTM_CAP_RESET_TPMESTABLISHED = 1 << 7
    PTM_CAP_GET_STATEBLOB = 1 << 8
    PTM_CAP_SET_STATEBLOB = 1 << 9
    PTM_CAP_STOP = 1 << 10
    PTM_CAP_GET_CONFIG = 1 << 11
    PTM_CAP_SET_DATAFD = 1 << 12
    PTM_CAP_SET_BUFFERSIZE = 1 << 13
    PTM_CAP_GET_INFO = 1 << 14
    PTM_CAP_SEND_COMMAND_HEADER = 1 << 15
    PTM_CAP_LOCK_STORAGE = 1 << 16


class PtmInitFlag(IntFlag):
    """Flags of PTM_INIT."""

    PTM_INIT_FLAG_DELETE_VOLATILE = 1


class PtmStateFlag(IntFlag):
    """Flags of PTM_GET_STATEBLOB (request and response) and PTM_SET_STATEBLOB."""

    PTM_STATE_FLAG_DECRYPTED = 1
    PTM_STATE_FLAG_ENCRYPTED = 2


class PtmConfigFlag(IntFlag):
    """Answer of PTM_GET_CONFIG."""

    PTM_CONFIG_FLAG_FILE_KEY = 1
    PTM_CONFIG_FLAG_MIGRATION_KEY = 2


class PtmBlobType(IntEnum):
    """Which state blob PTM_GET_STATEBLOB and PTM_SET_STATEBLOB mean."""

    PTM_BLOB_TYPE_PERMANENT = 1
    PTM_BLOB_TYPE_VOLATILE = 2
    PTM_BLOB_TYPE_SAVESTATE = 3


class PtmResult(IntEnum):
    """Results that requests are answered with; libtpms' codes pass through beside them."""

    TPM_SUCCESS = 0
    TPM_BAD_PARAMETER = 0x3
    TPM_FAIL = 0x9
    TPM_BAD_ORDINAL = 0xA
    TPM_KEYNOTFOUND = 0xD
    TPM_SIZE = 0x17
    TPM_IOERROR = 0x1F
    TPM_DECRYPT_ERROR = 0x21
    TPM_BAD_KEY_PROPERTY = 0x28
    TPM_BAD_DATASIZE = 0x2B
    TPM_BAD_VERSION = 0x2E
    TPM_BAD_LOCALITY = 0x3D
    TPM_RC_FAILURE = 0x101
    TPM_RETRY = 0x800


@wire()
class PtmEmpty(WireStruct):
    """No request body."""


@wire()
class PtmResultResponse(WireStruct):
    """The bare result: the whole response of most requests, and of every failed one."""

    result: U32


@wire()
class PtmCapabilityIoctl(WireStruct):
    """PTM_GET_CAPABILITY as ioctl: a bare mask, for it cannot fail."""

    caps: U64


@wire()
class PtmCapabilityControl(WireStruct):
    """PTM_GET_CAPABILITY on the control channel; read as one u64 it is the mask too."""

    result: U32
    caps: U32


@wire()
class PtmInitRequest(WireStruct):
    """PTM_INIT request; flags are PtmInitFlag."""

    init_flags: U32


@wire(pad=3)
class PtmEstablishedResponse(WireStruct):
    """PTM_GET_TPMESTABLISHED response, 8 bytes in both forms."""

    result: U32
    bit: U8


@wire(pad=3)
class PtmLocalityRequest(WireStruct):
    """PTM_SET_LOCALITY and PTM_RESET_TPMESTABLISHED request.

    On the control channel the padding may be absent.
    """

    locality: U8


@wire(tail=PTM_HASH_DATA_SIZE)
class PtmHashDataRequest(WireStruct):
    """PTM_HASH_DATA request; length counts the bytes of data."""

    length: U32
    data: Tail


@wire()
class PtmGetStateRequest(WireStruct):
    """PTM_GET_STATEBLOB request; state_flags are PtmStateFlag, type is a PtmBlobType."""

    state_flags: U32
    type: U32
    offset: U32


@wire(tail=PTM_STATE_BLOB_SIZE)
class PtmGetStateResponse(WireStruct):
    """PTM_GET_STATEBLOB response; length counts the bytes of data."""

    result: U32
    state_flags: U32
    totlength: U32
    length: U32
    data: Tail


@wire(tail=PTM_STATE_BLOB_SIZE)
class PtmSetStateRequest(WireStruct):
    """PTM_SET_STATEBLOB request; length counts the bytes of data."""

    state_flags: U32
    type: U32
    length: U32
    data: Tail


@wire()
class PtmConfigResponse(WireStruct):
    """PTM_GET_CONFIG response; flags are PtmConfigFlag."""

    result: U32
    flags: U32


@wire()
class PtmBufferSizeRequest(WireStruct):
    """PTM_SET_BUFFERSIZE request in bytes; 0 asks only."""

    buffersize: U32


@wire()
class PtmBufferSizeResponse(WireStruct):
    """PTM_SET_BUFFERSIZE response in bytes: in use, smallest, largest."""

    result: U32
    buffersize: U32
    minsize: U32
    maxsize: U32


@wire()
class PtmInfoRequest(WireStruct):
    """PTM_GET_INFO request; flags select the parts of the JSON text."""

    flags: U64
    offset: U32
    padding: U32 = 0


@wire(tail=PTM_INFO_SIZE)
class PtmInfoResponse(WireStruct):
    """PTM_GET_INFO response: NUL-terminated JSON text from the asked offset on."""

    result: U32
    totlength: U32
    length: U32
    text: Tail


@wire()
class PtmLockStorageRequest(WireStruct):
    """PTM_LOCK_STORAGE request; one retry is 10 ms."""

    retries: U32


@wire()
class PtmClientsRequest(WireStruct):
    """PTM_GET_CLIENTS request; PtmInfoResponse answers it, with JSON text about clients."""

    offset: U32


@wire()
class PtmFlushClientRequest(WireStruct):
    """PTM_FLUSH_CLIENT request: a client's number, 0 for none's, and a handle, 0 for all of it."""

    client: U32
    handle: U32


_IOC_WRITE, _IOC_READ = 1, 2


class PtmSpec(NamedTuple):
    """One row of the table: what travels for a command, and its ioctl number."""

    request: type[WireStruct]
    response: type[WireStruct]

    @property
    def size(self) -> int:
        """Bytes of the ioctl argument: the larger side, to the widest field's alignment."""
        larger = max(self.request.SIZE + self.request.TAIL, self.response.SIZE + self.response.TAIL)
        return -(-larger // self._alignment) * self._alignment

    @property
    def _alignment(self) -> int:
        return 8 if self.request is PtmInfoRequest else 4

    def ioctl(self, command: PtmCommand) -> int:
        """The ioctl request number: _IOR or _IOWR of type 'P' (linux/ioctl.h)."""
        direction = _IOC_READ if self.request is PtmEmpty else _IOC_READ | _IOC_WRITE
        return direction << 30 | self.size << 16 | ord("P") << 8 | command


PTM_SPECS: Final[dict[PtmCommand, PtmSpec]] = {
    PtmCommand.PTM_GET_CAPABILITY: PtmSpec(PtmEmpty, PtmCapabilityIoctl),
    PtmCommand.PTM_INIT: PtmSpec(PtmInitRequest, PtmResultResponse),
    PtmCommand.PTM_SHUTDOWN: PtmSpec(PtmEmpty, PtmResultResponse),
    PtmCommand.PTM_GET_TPMESTABLISHED: PtmSpec(PtmEmpty, PtmEstablishedResponse),
    PtmCommand.PTM_SET_LOCALITY: PtmSpec(PtmLocalityRequest, PtmResultResponse),
    PtmCommand.PTM_HASH_START: PtmSpec(PtmEmpty, PtmResultResponse),
    PtmCommand.PTM_HASH_DATA: PtmSpec(PtmHashDataRequest, PtmResultResponse),
    PtmCommand.PTM_HASH_END: PtmSpec(PtmEmpty, PtmResultResponse),
    PtmCommand.PTM_CANCEL_TPM_CMD: PtmSpec(PtmEmpty, PtmResultResponse),
    PtmCommand.PTM_STORE_VOLATILE: PtmSpec(PtmEmpty, PtmResultResponse),
    PtmCommand.PTM_RESET_TPMESTABLISHED: PtmSpec(PtmLocalityRequest, PtmResultResponse),
    PtmCommand.PTM_GET_STATEBLOB: PtmSpec(PtmGetStateRequest, PtmGetStateResponse),
    PtmCommand.PTM_SET_STATEBLOB: PtmSpec(PtmSetStateRequest, PtmResultResponse),
    PtmCommand.PTM_STOP: PtmSpec(PtmEmpty, PtmResultResponse),
    PtmCommand.PTM_GET_CONFIG: PtmSpec(PtmEmpty, PtmConfigResponse),
    PtmCommand.PTM_SET_DATAFD: PtmSpec(PtmEmpty, PtmResultResponse),
    PtmCommand.PTM_SET_BUFFERSIZE: PtmSpec(PtmBufferSizeRequest, PtmBufferSizeResponse),
    PtmCommand.PTM_GET_INFO: PtmSpec(PtmInfoRequest, PtmInfoResponse),
    PtmCommand.PTM_LOCK_STORAGE: PtmSpec(PtmLockStorageRequest, PtmResultResponse),
    PtmCommand.PTM_GET_CLIENTS: PtmSpec(PtmClientsRequest, PtmInfoResponse),
    PtmCommand.PTM_FLUSH_CLIENT: PtmSpec(PtmFlushClientRequest, PtmResultResponse),
}

PTM_IOCTLS: Final = {spec.ioctl(command): command for command, spec in PTM_SPECS.items()}
"""ioctl request number to command."""
