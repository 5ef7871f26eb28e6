"""What the control channel answers: PTM requests big-endian, with its own rules of length.

The meaning of the requests is `vtpm.ptm`'s; here is only what differs from
the ioctls: bodies of any length, and state blobs and long texts in one message.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from vtpm_cuse import faults
from vtpm_cuse.errors import PtmError, VtpmError
from vtpm_cuse.proto.control import exact_body, least_body_size
from vtpm_cuse.vtpm.ptm import CAPABILITIES, CAPABILITIES_BORROWED, PtmService, text_part
from vtpm_cuse.wire.blob import INCOMING_BLOB_MAX
from vtpm_cuse.wire.layout import BIG
from vtpm_cuse.wire.ptm import (
    PTM_SPECS,
    PtmBlobType,
    PtmCapability,
    PtmCapabilityControl,
    PtmClientsRequest,
    PtmCommand,
    PtmGetStateRequest,
    PtmGetStateResponse,
    PtmHashDataRequest,
    PtmResult,
    PtmResultResponse,
    PtmSetStateRequest,
    PtmStateFlag,
)

if TYPE_CHECKING:
    from vtpm_cuse.proto.control import ControlRequest
    from vtpm_cuse.vtpm.vtpm import Vtpm
    from vtpm_cuse.wire.layout import WireStruct

log = logging.getLogger(__name__)


def answer(vtpm: Vtpm, ptm: PtmService, request: ControlRequest) -> bytes:
    """The response to any request but SET_DATAFD, which is about the transport itself."""
    try:
        return _answer(vtpm, ptm, request).pack(BIG)
    except VtpmError as exc:
        log.debug("Control command 0x%x: %s", request.number, exc)
        return PtmResultResponse(faults.tpm_result(exc)).pack(BIG)


def _answer(vtpm: Vtpm, ptm: PtmService, request: ControlRequest) -> WireStruct:
    command = request.command
    if command is None:
        log.error("Error: Unknown command: 0x%08x", request.number)
        raise PtmError(PtmResult.TPM_BAD_ORDINAL)
    if command is PtmCommand.PTM_SET_BUFFERSIZE:
        _check_length(command, request.body)
    ptm.check_state(command)
    _check_length(command, request.body)
    if command is PtmCommand.PTM_GET_CAPABILITY:
        if vtpm.borrowed:
            return PtmCapabilityControl(PtmResult.TPM_SUCCESS, CAPABILITIES_BORROWED)
        extra = PtmCapability.PTM_CAP_SET_DATAFD
        if vtpm.tpm2:
            extra |= PtmCapability.PTM_CAP_SEND_COMMAND_HEADER
        return PtmCapabilityControl(PtmResult.TPM_SUCCESS, CAPABILITIES | extra)
    kind = PTM_SPECS[command].request
    # The padding of a locality need not come.
    message = kind.unpack_untrusted(request.body.ljust(kind.SIZE, b"\0"), BIG)
    match message:
        case PtmGetStateRequest():
            return _get_blob(vtpm, message)
        case PtmSetStateRequest():
            return _set_blob(vtpm, message)
        case PtmClientsRequest():
            text = ptm.need_managed().describe()
            return text_part(text, message.offset, size=len(text) + 1)
        case PtmHashDataRequest() if len(message.data) != message.length:
            raise PtmError(PtmResult.TPM_BAD_PARAMETER)
    return ptm.handle(command, message)


def _check_length(command: PtmCommand, body: bytes) -> None:
    least = least_body_size(command)
    if len(body) < least or (len(body) > least and exact_body(command)):
        raise PtmError(PtmResult.TPM_BAD_PARAMETER, f"body of {len(body)} bytes")


def _get_blob(vtpm: Vtpm, request: PtmGetStateRequest) -> WireStruct:
    """One response carries everything from the offset on; both lengths count that."""
    decrypted = bool(request.state_flags & PtmStateFlag.PTM_STATE_FLAG_DECRYPTED)
    try:
        flags, blob = vtpm.export_blob(request.type, decrypted=decrypted)
    except VtpmError as exc:
        return PtmGetStateResponse(faults.tpm_result(exc), 0, 0, 0, b"")
    finally:
        if request.type == PtmBlobType.PTM_BLOB_TYPE_SAVESTATE:
            # The last blob of a migration: from here on the state may be another process'.
            vtpm.release_storage()
    rest = blob[request.offset :]
    return PtmGetStateResponse(PtmResult.TPM_SUCCESS, flags, len(rest), len(rest), rest)


def _set_blob(vtpm: Vtpm, request: PtmSetStateRequest) -> WireStruct:
    if request.length > INCOMING_BLOB_MAX:
        raise PtmError(PtmResult.TPM_FAIL, f"state blob of {request.length} bytes")
    if request.length != len(request.data):
        raise PtmError(PtmResult.TPM_BAD_PARAMETER, f"state blob of {len(request.data)} bytes")
    try:
        vtpm.import_blob(request.type, request.state_flags, request.data)
    except VtpmError as exc:
        log.error("State blob refused: %s", exc)
        raise
    return PtmResultResponse(PtmResult.TPM_SUCCESS)
