"""Lines: how one manager after the other comes to a process that outlives it.

The process waits at one end; who has the other end brings channels. One who is killed in the middle
of a message takes his channels with him, and the next one brings others: half a message is never
followed by the rest of another one. The end of the line is the end of the process.
"""

from __future__ import annotations

import contextlib
import socket
from typing import Final

TELL: Final = b"t"
"""A word: whoever waits there says what he has of earlier managers."""
GO_ON: Final = b"g"
"""A word: this one knows."""
_TOGETHER: Final = socket.SOCK_SEQPACKET
"""What is brought arrives whole, or not at all."""


def line() -> tuple[socket.socket, socket.socket]:
    """A line's two ends: for managers, and for who waits. Raises OSError."""
    return socket.socketpair(socket.AF_UNIX, _TOGETHER)


def bring(end: socket.socket, count: int, word: bytes) -> list[socket.socket]:
    """Brings so many channels, and a *word* about them, one byte; gives our ends. Raises OSError."""
    with contextlib.ExitStack() as undo:
        ours: list[socket.socket] = []
        theirs: list[int] = []
        with contextlib.ExitStack() as sent:
            for _ in range(count):
                one, other = socket.socketpair()
                ours.append(undo.enter_context(one))
                theirs.append(sent.enter_context(other).fileno())
            socket.send_fds(end, [word], theirs, socket.MSG_DONTWAIT)
        undo.pop_all()
    return ours


def brought(end: socket.socket, count: int) -> tuple[bytes, list[socket.socket]] | None:
    """Waits for channels, which are so many; None at the end of the line."""
    try:
        word, descriptors, *_ = socket.recv_fds(end, 1, count, socket.MSG_CMSG_CLOEXEC)
    except OSError:
        return None
    channels = [socket.socket(fileno=fd) for fd in descriptors]
    return (word, channels) if len(channels) == count else None
