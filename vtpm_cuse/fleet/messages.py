"""What manager, zygote and workers say to each other: bytes in, messages out. No I/O.

A message is a header and a body; descriptors come with the header's bytes. Who is at the other end
of a worker's channel may have been taken over: what it says is bounded here.
"""

import json
import os
from collections import deque
from enum import IntEnum
from typing import Final, NamedTuple

from vtpm_cuse import errors
from vtpm_cuse.errors import ChannelError, StorageError
from vtpm_cuse.wire.layout import HOST, U8, U16, U32, U64, WireStruct, wire

BODY_MAX: Final = 4 << 20
"""Bytes: four times the largest state, for all that hundreds of clients have."""
DESCRIPTORS_MAX: Final = 512
"""In one message: more than one TPM has clients."""


class Order(IntEnum):
    """What the manager tells a worker, a zygote, an opener, and the depot."""

    FORK = 1
    SERVE = 2
    SLEEP = 3
    STOP = 4
    RESET = 5
    OPEN = 6
    MOUNT = 7
    UNMOUNT = 8
    LOOK = 9
    COUNT = 10
    KEEP = 11
    FORGET = 12
    PROXY = 20
    GIVE = 21


class Report(IntEnum):
    """What a worker tells the manager, a zygote, an opener, and the depot."""

    READY = 65
    SERVING = 66
    DONE = 67
    BUSY = 68
    ASLEEP = 69
    STOPPED = 70
    FAILED = 71
    TOLD = 72
    COUNTED = 73


class Call(IntEnum):
    """What a worker wants of the state; the number is that of a blob in `storage.base.BLOB_NAMES`.

    Or, with ROOM, of its manager: to take so many descriptors.
    """

    LOAD = 129
    STORE = 130
    DELETE = 131
    SIZES = 132
    REMAINS = 133
    LOCK = 134
    UNLOCK = 135
    CLOSE = 136
    ROOM = 137


class Answer(IntEnum):
    """What it gets."""

    DONE = 193
    FAILED = 194


Kind = Order | Report | Call | Answer
_KINDS: Final[dict[int, Kind]] = {
    int(kind): kind for group in (Order, Report, Call, Answer) for kind in group
}


@wire()
class MessageHeader(WireStruct):
    """In front of each message, 16 bytes: its kind, two parameters, how much comes with it."""

    kind: U8
    flags: U8
    descriptors: U16
    length: U32
    number: U64


class Message(NamedTuple):
    """One message; ``flags`` and ``number`` mean what its kind says."""

    kind: Kind
    body: bytes = b""
    flags: int = 0
    number: int = 0
    descriptors: tuple[int, ...] = ()

    def pack(self) -> bytes:
        """Header and body; the descriptors are to come with the first bytes."""
        count, length = len(self.descriptors), len(self.body)
        return MessageHeader(self.kind, self.flags, count, length, self.number).pack(HOST) + (
            self.body
        )


_FAILURES: Final[dict[str, type[StorageError]]] = {
    kind.__name__: kind
    for kind in (
        *(errors.StorageError, errors.StateMissing, errors.StateLocked, errors.StateNoRoom),
        *(errors.StateDamaged, errors.StateKeyRejected),
    )
}


def described(exc: StorageError) -> bytes:
    """A failure as it goes over the channel."""
    return json.dumps([type(exc).__name__, *exc.args]).encode()


def failure(body: bytes) -> StorageError:
    """What `described` has told of."""
    kind, *arguments = json.loads(body)
    return _FAILURES[kind](*arguments)


class Inbox:
    """Messages as they come in, bytes and descriptors; these are closed that nobody takes."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._descriptors: deque[int] = deque()

    def feed(self, data: bytes, descriptors: list[int]) -> None:
        """Takes what has arrived. Raises ChannelError."""
        self._buffer += data
        self._descriptors.extend(descriptors)
        if len(self._descriptors) > DESCRIPTORS_MAX:
            raise ChannelError("too many descriptors")

    def next(self) -> Message | None:
        """The next message, when it is there whole. Raises ChannelError."""
        if len(self._buffer) < MessageHeader.SIZE:
            return None
        header = MessageHeader.unpack_untrusted(self._buffer, HOST)
        kind = _KINDS.get(header.kind)
        if kind is None or header.length > BODY_MAX or header.descriptors > DESCRIPTORS_MAX:
            raise ChannelError(f"a message of kind {header.kind} with {header.length} bytes")
        end = MessageHeader.SIZE + header.length
        if len(self._buffer) < end:
            return None
        if len(self._descriptors) < header.descriptors:
            raise ChannelError("descriptors are missing")
        body = bytes(self._buffer[MessageHeader.SIZE : end])
        del self._buffer[:end]
        taken = tuple(self._descriptors.popleft() for _ in range(header.descriptors))
        return Message(kind, body, header.flags, header.number, taken)

    def take_all(self) -> tuple[bytes, tuple[int, ...]]:
        """What has come of the next messages."""
        taken = bytes(self._buffer), tuple(self._descriptors)
        self._buffer.clear()
        self._descriptors.clear()
        return taken

    def close(self) -> None:
        """Closes the descriptors that are left."""
        while self._descriptors:
            os.close(self._descriptors.popleft())
