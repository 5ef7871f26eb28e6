"""Cuts a byte stream into TPM commands, by the length in their headers. Sans-IO.

PEER: takes whatever one read delivers for one command. Here a command may come
in pieces, and several in one piece. Bytes that cannot be a command get one
answer from the TPM, as there: clients probe that way.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from vtpm_cuse.wire.layout import BIG
from vtpm_cuse.wire.tpm import TPM_BUFFER_MAX, TPM_HEADER_SIZE, SendCommandHeader

_SEND_COMMAND: Final = (8).to_bytes(4, "big")


class Request(NamedTuple):
    """One TPM command, and the locality its prefix asks for (None: no prefix)."""

    command: bytes
    locality: int | None


class CommandStream:
    """One direction of a data connection.

    Args:
        prefix: Whether the send-command prefix is understood (TPM 2).
    """

    def __init__(self, *, prefix: bool) -> None:
        self._prefix = prefix
        self._buffer = b""

    @property
    def partial(self) -> bool:
        """Whether bytes wait for the rest of their command."""
        return bool(self._buffer)

    def feed(self, data: bytes) -> None:
        """Takes bytes as they arrived."""
        self._buffer = self._buffer + data if self._buffer else data

    def next_request(self, *, flush: bool = False) -> Request | None:
        """The next command, or None until more bytes arrive.

        Args:
            flush: Nothing more will come: what is there counts as the command, unless it
                is shorter than a header.
        """
        buffer = self._buffer
        locality, start = None, 0
        if self._prefix and buffer[:4] == _SEND_COMMAND:
            if len(buffer) < SendCommandHeader.SIZE:
                return None
            locality = SendCommandHeader.unpack_untrusted(buffer, BIG).locality
            start = SendCommandHeader.SIZE
        there = len(buffer) - start
        if there < TPM_HEADER_SIZE:
            return None
        size = int.from_bytes(buffer[start + 2 : start + 6], "big")
        if not TPM_HEADER_SIZE <= size <= TPM_BUFFER_MAX or (flush and size > there):
            size = there  # no command: let the TPM say so
        if there < size:
            return None
        self._buffer = buffer[start + size :]
        return Request(buffer[start : start + size] if start or size < there else buffer, locality)


def framed(response: bytes, request: Request) -> bytes:
    """The response as it goes out: a prefixed command's has its length before, a zero behind."""
    if request.locality is None:
        return response
    return len(response).to_bytes(4, "big") + response + bytes(4)
