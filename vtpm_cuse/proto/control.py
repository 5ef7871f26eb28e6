"""Cuts the control channel's byte stream into requests. Sans-IO.

A request is a big-endian command number and a body without a length, so how
much to wait for depends on the command; everything that has arrived then
belongs to it. Source: the C suite's tpm_ioctl.h.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from vtpm_cuse.wire.ptm import (
    PTM_SPECS,
    PtmCommand,
    PtmEmpty,
    PtmHashDataRequest,
    PtmLocalityRequest,
    PtmSetStateRequest,
)

REQUEST_MAX: Final = 1 << 20
"""Bytes; a request that announces more is cut off there, and refused for its length."""

_COMMAND_SIZE: Final = 4
_LENGTH_AT: Final = {
    PtmCommand.PTM_HASH_DATA: PtmHashDataRequest.SIZE,
    PtmCommand.PTM_SET_STATEBLOB: PtmSetStateRequest.SIZE,
}


class ControlRequest(NamedTuple):
    """One request; command is None for a number nobody knows."""

    command: PtmCommand | None
    number: int
    body: bytes


class ControlStream:
    """Requests of one control connection."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    @property
    def partial(self) -> bool:
        """Whether bytes wait for the rest of their request."""
        return bool(self._buffer)

    def feed(self, data: bytes) -> None:
        """Takes bytes as they arrived."""
        self._buffer += data

    def next_request(self) -> ControlRequest | None:
        """The request that is complete, or None until more bytes arrive."""
        if len(self._buffer) < _COMMAND_SIZE:
            return None
        number = int.from_bytes(self._buffer[:_COMMAND_SIZE], "big")
        body = bytes(self._buffer[_COMMAND_SIZE:])
        try:
            command: PtmCommand | None = PtmCommand(number - 1)
        except ValueError:
            command = None
        if command is not None and len(body) < min(_body_size(command, body), REQUEST_MAX):
            return None
        self._buffer.clear()
        return ControlRequest(command, number, body)


def least_body_size(command: PtmCommand) -> int:
    """Bytes of body that *command* must have; the padding of a locality need not come."""
    request = PTM_SPECS[command].request
    return 1 if request is PtmLocalityRequest else request.SIZE


def exact_body(command: PtmCommand) -> bool:
    """Whether surplus bytes are an error: INIT, and the requests without a body but one."""
    request = PTM_SPECS[command].request
    lenient = {PtmCommand.PTM_GET_CAPABILITY, PtmCommand.PTM_SET_DATAFD}
    return command is PtmCommand.PTM_INIT or (request is PtmEmpty and command not in lenient)


def _body_size(command: PtmCommand, body: bytes) -> int:
    least = least_body_size(command)
    end = _LENGTH_AT.get(command)
    if end is None or len(body) < end:
        return least
    return end + int.from_bytes(body[end - 4 : end], "big")
