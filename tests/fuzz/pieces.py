"""One input as several messages: each behind its length in two bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


def joined(*messages: bytes) -> bytes:
    """An input of these messages."""
    return b"".join(len(message).to_bytes(2, "big") + message for message in messages)


def pieces(data: bytes) -> Iterator[bytes]:
    """The messages of any input; the last may be shorter than it says."""
    while data:
        size = int.from_bytes(data[:2], "big")
        yield data[2 : 2 + size]
        data = data[2 + size :]
