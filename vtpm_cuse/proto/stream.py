"""Cuts a byte stream into TPM commands, by the length in their headers. Sans-IO.

PEER: takes whatever one read delivers for one command. Here a command may come
in pieces, and several in one piece. Bytes that cannot be a command get one
answer from the TPM, as there: clients probe that way.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from vtpm_cuse.wire.layout import BIG
from vtpm_cuse.wire.tpm import (
    TPM_BUFFER_MAX,
    TPM_HEADER_SIZE,
    TPM_SEND_COMMAND,
    SendCommandHeader,
    TpmTag,
)

_SEND_COMMAND: Final = TPM_SEND_COMMAND.to_bytes(4, "big")
_TAGS: Final = tuple(
    tag.to_bytes(2, "big")
    for tag in (
        TpmTag.TPM_ST_NO_SESSIONS,
        TpmTag.TPM_ST_SESSIONS,
        TpmTag.TPM_TAG_RQU_COMMAND,
        TpmTag.TPM_TAG_RQU_AUTH1_COMMAND,
        TpmTag.TPM_TAG_RQU_AUTH2_COMMAND,
    )
)
_BEGINNINGS: Final = (_SEND_COMMAND, *_TAGS)
"""What a command starts with, of either version."""

_SIZE_END: Final = 6


class Request(NamedTuple):
    """One TPM command, and the locality its prefix asks for (None: no prefix)."""

    command: bytes
    locality: int | None


class CommandStream:
    """One direction of a data connection.

    Args:
        prefix: Whether the send-command prefix is understood (TPM 2).
        strict: The client may be a web browser that somebody else has sent: what cannot be a
            command ends the connection, and nothing before or behind it is executed.
        largest: Bytes of the longest command that the TPM takes.

    Attributes:
        broken: Nobody can tell where the next command begins: the connection must end.
    """

    def __init__(
        self, *, prefix: bool, strict: bool = False, largest: int = TPM_BUFFER_MAX
    ) -> None:
        self._prefix = prefix
        self._strict = strict
        self._sizes = range(TPM_HEADER_SIZE, largest + 1)
        self._buffer = b""
        self.broken = False

    def suspend(self) -> bytes:
        """All that it knows, as a plain value; one that is broken is not suspended."""
        return self._buffer

    def resume(self, saved: bytes) -> None:
        """As it was suspended."""
        self._buffer = saved

    @property
    def empty(self) -> bool:
        """Whether nothing waits: the next bytes are the beginning of a command."""
        return not self._buffer

    @property
    def awaits_rest(self) -> bool:
        """Whether bytes wait that `next_request` would give away if told to flush."""
        there = len(self._buffer) - self._start()
        return there >= TPM_HEADER_SIZE or (there > 0 and self._start() > 0)

    def feed(self, data: bytes) -> None:
        """Takes bytes as they arrived."""
        self._buffer = self._buffer + data if self._buffer else data

    def next_request(self, *, flush: bool = False) -> Request | None:
        """The next command, or None until more bytes arrive.

        Args:
            flush: Nothing more will come: what is there counts as the command, unless it
                is shorter than a header and has no prefix.
        """
        buffer, start = self._buffer, self._start()
        there = len(buffer) - start
        if self._strict and not self._may_be_command(start):
            self.broken = True
            return None
        if there >= TPM_HEADER_SIZE:
            size = int.from_bytes(buffer[start + 2 : start + 6], "big")
            if size > there and size in self._sizes and not flush:
                return None
            if size != there and not self._ends_at(start + size, size):
                if self._strict:
                    self.broken = True
                    if size < there:
                        return None
                size = there  # no command: let the TPM say so
        elif flush and start and there > 0:
            size = there
        else:
            return None
        locality = None
        if start:
            locality = SendCommandHeader.unpack_untrusted(buffer, BIG).locality
        self._buffer = buffer[start + size :]
        return Request(buffer[start : start + size] if start or size < there else buffer, locality)

    def _may_be_command(self, start: int) -> bool:
        """Whether what is there begins as a command does that begins at *start*."""
        head = self._buffer[start : start + TPM_HEADER_SIZE]
        tags = _BEGINNINGS if self._prefix and not start else _TAGS
        return any(head[: len(tag)] == tag[: len(head)] for tag in tags) and (
            len(head) < _SIZE_END
            or head[:4] == _SEND_COMMAND
            or int.from_bytes(head[2:_SIZE_END], "big") in self._sizes
        )

    def _start(self) -> int:
        """Where the command itself begins."""
        prefixed = self._prefix and self._buffer[:4] == _SEND_COMMAND
        return SendCommandHeader.SIZE if prefixed else 0

    def _ends_at(self, end: int, size: int) -> bool:
        """Whether what follows is another command: surplus bytes are not cut off."""
        rest = self._buffer[end:]
        return (
            size in self._sizes
            and bool(rest)
            and any(rest[: len(begin)] == begin[: len(rest)] for begin in _BEGINNINGS)
        )


class MessageStream(CommandStream):
    """For a device that delivers whole commands: what one read gives is one, whatever it is."""

    def __init__(self) -> None:
        super().__init__(prefix=False)

    @property
    def awaits_rest(self) -> bool:
        """Never: a message comes whole."""
        return False

    def next_request(self, *, flush: bool = False) -> Request | None:
        """The message that was fed, if there is one."""
        command, self._buffer = self._buffer, b""
        return Request(command, None) if command else None


def framed(response: bytes, request: Request) -> bytes:
    """The response as it goes out: a prefixed command's has its length before, a zero behind."""
    if request.locality is None:
        return response
    return len(response).to_bytes(4, "big") + response + bytes(4)
