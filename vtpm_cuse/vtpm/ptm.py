"""PTM requests, answered once for ioctl and control channel alike.

Structures in, structures out; how they travel, and in which pieces a state
blob does, is the transport's business.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from vtpm_cuse import faults
from vtpm_cuse.errors import PtmError, VtpmError
from vtpm_cuse.wire.ptm import (
    PTM_INFO_SIZE,
    PtmBufferSizeRequest,
    PtmBufferSizeResponse,
    PtmCapability,
    PtmCommand,
    PtmConfigResponse,
    PtmEstablishedResponse,
    PtmFlushClientRequest,
    PtmHashDataRequest,
    PtmInfoRequest,
    PtmInfoResponse,
    PtmInitFlag,
    PtmInitRequest,
    PtmLocalityRequest,
    PtmLockStorageRequest,
    PtmResult,
    PtmResultResponse,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from vtpm_cuse.vtpm.managed import ManagedVtpm
    from vtpm_cuse.vtpm.vtpm import Vtpm
    from vtpm_cuse.wire.layout import WireStruct

log = logging.getLogger(__name__)

ANSWERED_WHILE_BUSY: Final = frozenset(
    {
        PtmCommand.PTM_GET_CAPABILITY,
        PtmCommand.PTM_SET_LOCALITY,
        PtmCommand.PTM_CANCEL_TPM_CMD,
        PtmCommand.PTM_GET_CONFIG,
        PtmCommand.PTM_SET_BUFFERSIZE,
        PtmCommand.PTM_GET_INFO,
    }
)
"""Requests that do not wait for a running TPM command."""

_NEED_RUNNING: Final = frozenset(
    {
        PtmCommand.PTM_GET_TPMESTABLISHED,
        PtmCommand.PTM_RESET_TPMESTABLISHED,
        PtmCommand.PTM_HASH_START,
        PtmCommand.PTM_HASH_DATA,
        PtmCommand.PTM_HASH_END,
        PtmCommand.PTM_CANCEL_TPM_CMD,
        PtmCommand.PTM_STORE_VOLATILE,
        PtmCommand.PTM_GET_STATEBLOB,
    }
)

_NEED_STATE: Final = frozenset(
    {PtmCommand.PTM_INIT, PtmCommand.PTM_SET_STATEBLOB, PtmCommand.PTM_LOCK_STORAGE}
)
"""Requests that take the state, which after PTM_SHUTDOWN may be another process'."""

ABOUT_CLIENTS: Final = frozenset({PtmCommand.PTM_GET_CLIENTS, PtmCommand.PTM_FLUSH_CLIENT})
"""Requests to the resource manager, which belongs to who uses the TPM."""

_FOR_BORROWED: Final = frozenset(
    {
        PtmCommand.PTM_GET_CAPABILITY,
        PtmCommand.PTM_SHUTDOWN,
        PtmCommand.PTM_SET_LOCALITY,
        PtmCommand.PTM_CANCEL_TPM_CMD,
        PtmCommand.PTM_GET_CONFIG,
        *ABOUT_CLIENTS,
    }
)
"""Requests that a TPM which is not ours can fulfil; all others are about power, state, platform."""

CAPABILITIES_BORROWED: Final = (
    PtmCapability.PTM_CAP_SHUTDOWN
    | PtmCapability.PTM_CAP_SET_LOCALITY
    | PtmCapability.PTM_CAP_CANCEL_TPM_CMD
    | PtmCapability.PTM_CAP_GET_CONFIG
)
CAPABILITIES: Final = (
    PtmCapability.PTM_CAP_INIT
    | PtmCapability.PTM_CAP_SHUTDOWN
    | PtmCapability.PTM_CAP_GET_TPMESTABLISHED
    | PtmCapability.PTM_CAP_SET_LOCALITY
    | PtmCapability.PTM_CAP_HASHING
    | PtmCapability.PTM_CAP_CANCEL_TPM_CMD
    | PtmCapability.PTM_CAP_STORE_VOLATILE
    | PtmCapability.PTM_CAP_RESET_TPMESTABLISHED
    | PtmCapability.PTM_CAP_GET_STATEBLOB
    | PtmCapability.PTM_CAP_SET_STATEBLOB
    | PtmCapability.PTM_CAP_STOP
    | PtmCapability.PTM_CAP_GET_CONFIG
    | PtmCapability.PTM_CAP_SET_BUFFERSIZE
    | PtmCapability.PTM_CAP_GET_INFO
    | PtmCapability.PTM_CAP_LOCK_STORAGE
)
"""What every interface offers; a transport adds its own."""


class PtmService:
    """Answers the requests whose meaning does not depend on the transport.

    Args:
        vtpm: The TPM.
        give_up: Called by PTM_SHUTDOWN before it is answered, for who has the answer may start
            a successor at once.

    Attributes:
        managed: The resource manager's clients, once there is one.
        shutdown_requested: PTM_SHUTDOWN was answered.
    """

    def __init__(self, vtpm: Vtpm, give_up: Callable[[], None] = lambda: None) -> None:
        self.vtpm = vtpm
        self._give_up = give_up
        self.managed: ManagedVtpm | None = None
        self.shutdown_requested = False
        self._handlers: dict[PtmCommand, Callable[..., WireStruct | int | None]] = {
            PtmCommand.PTM_INIT: self._init,
            PtmCommand.PTM_SHUTDOWN: self._shutdown,
            PtmCommand.PTM_GET_TPMESTABLISHED: self._established,
            PtmCommand.PTM_SET_LOCALITY: self._set_locality,
            PtmCommand.PTM_HASH_START: lambda _: vtpm.hash_start(),
            PtmCommand.PTM_HASH_DATA: self._hash_data,
            PtmCommand.PTM_HASH_END: lambda _: vtpm.hash_end(),
            PtmCommand.PTM_CANCEL_TPM_CMD: lambda _: vtpm.cancel(),
            PtmCommand.PTM_STORE_VOLATILE: lambda _: vtpm.store_volatile(),
            PtmCommand.PTM_RESET_TPMESTABLISHED: self._reset_established,
            PtmCommand.PTM_STOP: lambda _: vtpm.stop(),
            PtmCommand.PTM_GET_CONFIG: self._config,
            PtmCommand.PTM_SET_BUFFERSIZE: self._buffer_size,
            PtmCommand.PTM_GET_INFO: self._info,
            PtmCommand.PTM_LOCK_STORAGE: self._lock_storage,
            PtmCommand.PTM_FLUSH_CLIENT: self._flush_client,
        }

    def handle(self, command: PtmCommand, request: WireStruct) -> WireStruct:
        """The response; a failed request gets a PtmResultResponse. Never raises VtpmError."""
        try:
            self.check_state(command)
            answer = self._handlers[command](request)
        except VtpmError as exc:
            log.debug("%s: %s", command.name, exc)
            return PtmResultResponse(faults.tpm_result(exc))
        if answer is None:
            return PtmResultResponse(PtmResult.TPM_SUCCESS)
        return PtmResultResponse(answer) if isinstance(answer, int) else answer

    def check_state(self, command: PtmCommand) -> None:
        """Raises PtmError when the TPM must run, or must not, for this command."""
        running = self.vtpm.running
        if (
            (command in _NEED_STATE and self.shutdown_requested)
            or (command in _NEED_RUNNING and not running)
            or (command not in _FOR_BORROWED and self.vtpm.borrowed)
            or (command is PtmCommand.PTM_SET_STATEBLOB and running)
        ):
            raise PtmError(PtmResult.TPM_BAD_ORDINAL)

    def _init(self, request: PtmInitRequest) -> None:
        delete = bool(request.init_flags & PtmInitFlag.PTM_INIT_FLAG_DELETE_VOLATILE)
        self.vtpm.start(delete_volatile=delete)

    def _shutdown(self, _request: WireStruct) -> None:
        self.vtpm.stop()
        self.shutdown_requested = True
        self._give_up()

    def _established(self, _request: WireStruct) -> WireStruct:
        return PtmEstablishedResponse(PtmResult.TPM_SUCCESS, int(self.vtpm.established()))

    def _set_locality(self, request: PtmLocalityRequest) -> None:
        self.vtpm.set_locality(request.locality)

    def _reset_established(self, request: PtmLocalityRequest) -> int:
        return self.vtpm.reset_established(request.locality)

    def _hash_data(self, request: PtmHashDataRequest) -> int:
        if request.length > len(request.data):
            raise PtmError(PtmResult.TPM_FAIL)
        return self.vtpm.hash_data(request.data[: request.length])

    def _config(self, _request: WireStruct) -> WireStruct:
        return PtmConfigResponse(PtmResult.TPM_SUCCESS, self.vtpm.config_flags())

    def _buffer_size(self, request: PtmBufferSizeRequest) -> WireStruct:
        if request.buffersize and self.vtpm.running:
            raise PtmError(PtmResult.TPM_BAD_ORDINAL)
        sizes = self.vtpm.buffer_size(request.buffersize)
        return PtmBufferSizeResponse(PtmResult.TPM_SUCCESS, *sizes)

    def _info(self, request: PtmInfoRequest) -> WireStruct:
        return text_part(self.vtpm.info(request.flags).encode(), request.offset)

    def need_managed(self) -> ManagedVtpm:
        """The clients. Raises PtmError, as for an unknown request, where there is no manager."""
        if self.managed is None:
            raise PtmError(PtmResult.TPM_BAD_ORDINAL)
        return self.managed

    def _flush_client(self, request: PtmFlushClientRequest) -> None:
        self.need_managed().flush(request.client, request.handle)

    def _lock_storage(self, request: PtmLockStorageRequest) -> None:
        """Blocks for 10 ms a retry."""
        self.vtpm.lock_storage(request.retries)


def text_part(text: bytes, offset: int, size: int = PTM_INFO_SIZE) -> PtmInfoResponse:
    """What of a text and the NUL behind it is answered at once. Raises PtmError behind its end."""
    text += b"\0"
    if offset >= len(text) - 1:
        raise PtmError(PtmResult.TPM_BAD_PARAMETER)
    part = text[offset : offset + size]
    return PtmInfoResponse(PtmResult.TPM_SUCCESS, len(text), len(part), part)
