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
"""Bytes; a request that announces more is refused at once."""

_COMMAND_SIZE: Final = 4
_ZEROS: Final = 3  # that every number known begins with
_FIRST_READ: Final = 4104
"""Bytes that must come soon. Once they are there, the rest of a long request may take its time."""

_COMMANDS: Final = {command + 1: command for command in PtmCommand}
_SET_DATAFD: Final = (PtmCommand.PTM_SET_DATAFD + 1).to_bytes(_COMMAND_SIZE, "big")
_LENGTH_AT: Final = {
    PtmCommand.PTM_HASH_DATA: PtmHashDataRequest.SIZE,
    PtmCommand.PTM_SET_STATEBLOB: PtmSetStateRequest.SIZE,
}
_ANSWERED_SHORT: Final = frozenset(
    {PtmCommand.PTM_SET_BUFFERSIZE, PtmCommand.PTM_GET_INFO, PtmCommand.PTM_LOCK_STORAGE}
)
"""PEER: does not wait for the bodies of these; here one that never comes is still answered."""


class ControlRequest(NamedTuple):
    """One request; command is None for a number nobody knows."""

    command: PtmCommand | None
    number: int
    body: bytes


class SavedControlStream(NamedTuple):
    """A stream as plain values: what is kept of a request, and the stream's two marks."""

    begun: bytes
    known: bool
    broken: bool


class ControlStream:
    """Requests of one control connection.

    Args:
        strict: Whoever is not known yet may be a web browser that somebody else has sent: what
            begins no request that is known ends the connection, and nothing behind it is read.

    Attributes:
        broken: Nobody can tell where the next request begins: the connection must end.
    """

    def __init__(self, *, strict: bool = False) -> None:
        self._strict = strict
        self._buffer = bytearray()
        self._known = False
        self.broken = False

    def suspend(self) -> SavedControlStream:
        """All that it knows."""
        return SavedControlStream(bytes(self._buffer), self._known, self.broken)

    def resume(self, saved: SavedControlStream) -> None:
        """As it was suspended."""
        self._buffer[:], self._known, self.broken = saved

    @property
    def held(self) -> int:
        """Bytes that are kept."""
        return len(self._buffer)

    @property
    def takes_descriptor(self) -> bool:
        """Whether what is kept may become a request that comes with a descriptor."""
        return _SET_DATAFD.startswith(self._buffer)

    @property
    def pressing(self) -> bool:
        """Whether bytes wait for the rest of their request, which must come soon."""
        return 0 < len(self._buffer) < _FIRST_READ

    def feed(self, data: bytes) -> None:
        """Takes bytes as they arrived."""
        self._buffer += data

    def next_request(self, *, flush: bool = False) -> ControlRequest | None:
        """The request that is complete, or None until more bytes arrive.

        Args:
            flush: Nothing more will come. The C suite answers some requests even so.
        """
        buffer = self._buffer
        if self._strict and buffer[:_ZEROS] != bytes(_ZEROS)[: len(buffer)]:
            self.broken = True
            return None
        if len(buffer) < _COMMAND_SIZE:
            return None
        number = int.from_bytes(buffer[:_COMMAND_SIZE], "big")
        command = _COMMANDS.get(number)
        if self._strict and command is None and not self._known:
            self.broken = True
            return None
        if command is not None:
            size = _COMMAND_SIZE + _body_size(command, buffer)
            self.broken = size > REQUEST_MAX
            answered = self.broken or (
                flush and (command in _ANSWERED_SHORT or len(buffer) >= _FIRST_READ)
            )
            if len(buffer) < size and not answered:
                return None
        body = bytes(buffer[_COMMAND_SIZE:])
        buffer.clear()
        self._known = True
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


def _body_size(command: PtmCommand, buffer: bytearray) -> int:
    end = _LENGTH_AT.get(command)
    if end is None or len(buffer) < _COMMAND_SIZE + end:
        return least_body_size(command)
    end += _COMMAND_SIZE
    return end - _COMMAND_SIZE + int.from_bytes(buffer[end - 4 : end], "big")
