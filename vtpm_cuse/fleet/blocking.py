"""Messages over a socket, with descriptors, for who may block; trio is not needed for it."""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
from typing import TYPE_CHECKING, Final

from vtpm_cuse.fleet.messages import Inbox

if TYPE_CHECKING:
    from vtpm_cuse.fleet.messages import Message

_READ_SIZE: Final = 1 << 16
_AT_ONCE: Final = 250
"""Descriptors that come with one byte; the kernel takes 253."""
_ROOM: Final = socket.CMSG_SPACE(_AT_ONCE * array.array("i").itemsize)


class Ends:
    """What both kinds of channels have."""

    def __init__(self, end: socket.socket, *, blocking: bool) -> None:
        end.setblocking(blocking)
        self._socket = end
        self._inbox = Inbox()

    def fileno(self) -> int:
        """Of the socket; -1 once it is closed."""
        return self._socket.fileno()

    def close(self) -> None:
        """Closes it, and the descriptors that nobody has taken."""
        self._inbox.close()
        self._socket.close()

    def end(self) -> None:
        """Nothing comes any more but what has come, whoever else has the other end."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def take_foreign(self) -> tuple[int, ...]:
        """What others have opened and nobody has taken; the socket, too, where some is still in it.

        Who closes that may have to wait for them: for a file of theirs, or a socket that lingers.
        """
        self.end()
        _, found = self._inbox.take_all()
        with contextlib.suppress(OSError):
            if self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                found = (*found, self._socket.detach())
        return found

    def is_at_end(self) -> bool:
        """Whether nothing comes any more, not even what has been sent already."""
        try:
            return self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _receive(self) -> bool:
        """Takes what is there; False at the end. Raises BlockingIOError, OSError."""
        data, ancillary, *_ = self._socket.recvmsg(_READ_SIZE, _ROOM, socket.MSG_CMSG_CLOEXEC)
        descriptors = array.array("i")
        for level, kind, payload in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                descriptors.frombytes(payload[: len(payload) - len(payload) % 4])
        self._inbox.feed(data, descriptors.tolist())
        return bool(data)

    def _send(self, data: memoryview, descriptors: list[int]) -> int:
        """Sends as much as goes; the descriptors that went leave the list. OSError."""
        now = descriptors[:_AT_ONCE]
        more = len(descriptors) > len(now)  # they need a byte each time
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", now))] if now else []
        sent = self._socket.sendmsg([data[:1] if more else data], rights)
        del descriptors[: len(now)]
        return sent


class BlockingChannel(Ends):
    """For who has nothing else to do meanwhile.

    Args:
        end: Of a socketpair.
        seconds: How long he waits at most for the other one to read, or to say, anything; 0 for ever.
    """

    def __init__(self, end: socket.socket, seconds: float = 0) -> None:
        super().__init__(end, blocking=True)
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO) if seconds else ():
            limit = struct.pack("@ll", int(seconds), int(seconds % 1 * 1_000_000))  # timeval
            end.setsockopt(socket.SOL_SOCKET, option, limit)

    def send(self, message: Message) -> None:
        """Sends all of it. Raises OSError; where he has waited in vain, nothing more can be sent."""
        rest, descriptors = memoryview(message.pack()), list(message.descriptors)
        while rest:
            rest = rest[self._send(rest, descriptors) :]

    def receive(self) -> Message | None:
        """The next message, None at the end. Raises ChannelError, OSError."""
        while (message := self._inbox.next()) is None:
            if not self._receive():
                return None
        return message


def close_all(descriptors: tuple[int, ...]) -> None:
    """Closes them; what is closed already is left."""
    for fd in descriptors:
        with contextlib.suppress(OSError):
            os.close(fd)
