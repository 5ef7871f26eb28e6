"""The last commands of a private TPM and its responses, as its emulator captures them.

The capture goes through a pipe, so that nothing is between the TPM and its clients. A thread reads
now and then, for the emulator waits while the pipe is full.
"""

from __future__ import annotations

import fcntl
import os
import select
import struct
import threading
import time
from collections import deque
from contextlib import suppress
from typing import Final, NamedTuple

from vtpm_cuse.client.child import Owned
from vtpm_cuse.wire.pcapng import TPM_PORT
from vtpm_cuse.wire.tpm import TPM_HEADER_SIZE, command_code

_PIPE_SIZE: Final = 1 << 18
_GATHER_SECONDS: Final = 0.02
"""Between two looks of the thread: to be woken for each packet would cost the clients more than all
else. A TPM cannot fill the pipe meanwhile."""

_READ_SIZE: Final = 1 << 16
_ENHANCED_PACKET: Final = 6
_BLOCK_HEAD: Final = 8
_FRAME_AT: Final = _BLOCK_HEAD + 20
_PORTS_AT: Final = _FRAME_AT + 14 + 20
_DATA_AT: Final = _PORTS_AT + 20


class Exchange(NamedTuple):
    """A command and the TPM's response, whole; the response is empty while there is none yet."""

    command: bytes
    response: bytes


def traced_lines(exchanges: list[Exchange]) -> list[str]:
    """For people: a line for each, without what passwords and secrets are in."""
    lines = []
    for command, response in exchanges:
        code = int.from_bytes(response[6:TPM_HEADER_SIZE], "big")
        result = f"0x{code:x}" if response else "no response"
        lines.append(f"command 0x{command_code(command).hex()}, {len(command)} bytes: {result}")
    return lines


class CaptureStream:
    """Exchanges out of what `wire.pcapng` makes. Sans-IO."""

    def __init__(self) -> None:
        self._buffer = b""
        self._command: bytes | None = None

    @property
    def command(self) -> bytes | None:
        """One that has no response yet."""
        return self._command

    def feed(self, data: bytes) -> list[Exchange]:
        """Those that *data* completes."""
        buffer = self._buffer + data
        at, found = 0, []
        while len(buffer) - at >= _BLOCK_HEAD:
            kind, size = struct.unpack_from("<II", buffer, at)
            if len(buffer) - at < size:
                break
            if kind == _ENHANCED_PACKET:
                found += self._packet(buffer[at : at + size])
            at += size
        self._buffer = buffer[at:]
        return found

    def _packet(self, block: bytes) -> list[Exchange]:
        (captured,) = struct.unpack_from("<I", block, _FRAME_AT - 8)
        _, port = struct.unpack_from("!HH", block, _PORTS_AT)
        data = block[_DATA_AT : _FRAME_AT + captured]
        if not data:
            return []
        if port == TPM_PORT:
            self._command = data
            return []
        command, self._command = self._command, None
        return [] if command is None else [Exchange(command, data)]


class Recorder(Owned):
    """Keeps the last exchanges.

    Args:
        count: How many.

    Attributes:
        fd: What the emulator writes to; `started` closes it.
    """

    def __init__(self, count: int) -> None:
        self._kept: deque[Exchange] = deque(maxlen=count)
        self._stream = CaptureStream()
        self._lock = threading.Lock()
        self._read_end, self.fd = os.pipe()
        os.set_blocking(self._read_end, False)
        with suppress(OSError):  # who may have no more has less room
            fcntl.fcntl(self.fd, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
        super().__init__()

    def started(self) -> None:
        """The emulator has it, and the only end to write to."""
        os.close(self.fd)
        self.fd = -1
        threading.Thread(target=self._read, name="vtpm-lab-recorder", daemon=True).start()

    def exchanges(self) -> list[Exchange]:
        """The last ones, among them all that have been answered by now."""
        with self._lock:
            self._drain()
            unanswered = self._stream.command
            return [*self._kept, *([Exchange(unanswered, b"")] if unanswered else [])]

    def clear(self) -> None:
        """Forgets what was before."""
        with self._lock:
            self._drain()
            self._kept.clear()

    def _read(self) -> None:
        poll = select.poll()
        poll.register(self._read_end, select.POLLIN)
        while True:
            poll.poll()
            time.sleep(_GATHER_SECONDS)
            with self._lock:
                if not self._drain():
                    return

    def _drain(self) -> bool:
        """Takes what is there; False at the end, when the emulator has gone."""
        while self._read_end >= 0:
            try:
                data = os.read(self._read_end, _READ_SIZE)
            except BlockingIOError:
                return True
            except OSError:  # somebody else has closed it
                data = b""
            if not data:
                self._close()
            self._kept.extend(self._stream.feed(data))
        return False

    def release(self) -> None:
        """See `Owned`. In its own process the thread closes it, at the emulator's end."""
        begun = self.fd < 0
        if not begun:
            os.close(self.fd)
            self.fd = -1
        if not (begun and self.ours):  # there is no thread
            self._close()

    def _close(self) -> None:
        if self._read_end >= 0:
            with suppress(OSError):
                os.close(self._read_end)
            self._read_end = -1
