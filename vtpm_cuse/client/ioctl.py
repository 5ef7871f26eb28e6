"""A vTPM on a character device, driven by ioctls on it."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from typing import TYPE_CHECKING

from vtpm_cuse.client.base import Control, check_size
from vtpm_cuse.errors import FrontendError, WireError
from vtpm_cuse.wire.layout import HOST
from vtpm_cuse.wire.ptm import (
    PTM_SPECS,
    PTM_STATE_BLOB_SIZE,
    PtmBlobType,
    PtmCommand,
    PtmGetStateRequest,
    PtmGetStateResponse,
    PtmSetStateRequest,
    PtmStateFlag,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vtpm_cuse.wire.layout import WireStruct


class DeviceControl(Control):
    """Opens *path*; while it is open, nobody else can use the device.

    Args:
        path: The character device, or the TPM's file in a FUSE mount.
        buffer_size: State blobs travel by read() and write() of so many bytes; 0 for ioctls alone.

    Raises:
        OSError: The device cannot be opened, or is none.
    """

    def __init__(self, path: str, buffer_size: int = 0) -> None:
        self._buffer_size = buffer_size
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        # PEER: writes its command over the start of anything else that was named by mistake.
        if not stat.S_ISCHR(os.fstat(self._fd).st_mode) and not self._answers():
            self.close()
            raise OSError(errno.ENODEV, "Neither a character device nor a TPM", path)

    def _answers(self) -> bool:
        """Whether a file that is no device is a TPM all the same, as in a FUSE mount."""
        try:
            self.request(PtmCommand.PTM_GET_CAPABILITY)
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Closes the device."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def get_state(self, kind: PtmBlobType, flags: PtmStateFlag) -> bytes:
        """The whole state blob."""
        blob = bytearray()
        while True:
            body = PtmGetStateRequest(flags, kind, len(blob))
            part = self._request_for(PtmGetStateResponse, PtmCommand.PTM_GET_STATEBLOB, body)
            check_size("State blob", part.totlength)
            blob += part.data[: part.length]
            if self._buffer_size and part.length and len(blob) < part.totlength:
                blob += self._read(part.totlength - len(blob))
            if len(blob) >= part.totlength:
                return bytes(blob)
            if self._buffer_size or part.length < PTM_STATE_BLOB_SIZE:  # no more will come
                raise WireError("State blob", part.totlength, len(blob))

    def set_state(self, kind: PtmBlobType, blob: bytes) -> None:
        """Gives the vTPM a state blob."""
        pieces = self._written(blob) if self._buffer_size and blob else _pieces(blob)
        for piece in pieces:
            self._send_piece(kind, piece)

    def _exchange(self, command: PtmCommand, body: WireStruct) -> WireStruct:
        spec = PTM_SPECS[command]
        argument = bytearray(body.pack(HOST).ljust(spec.size, b"\0"))
        fcntl.ioctl(self._fd, spec.ioctl(command), argument)
        return spec.response.unpack_untrusted(argument, HOST)

    def _read(self, size: int) -> bytes:
        """What the ioctl left of a blob; the device ends the transfer after a short read."""
        rest = bytearray()
        while len(rest) < size:
            part = os.read(self._fd, self._buffer_size)
            rest += part
            if len(part) < self._buffer_size:
                break
        return bytes(rest)

    def _written(self, blob: bytes) -> Iterator[bytes]:
        yield b""  # a first piece that is empty means: write() brings the blob
        while blob:
            blob = blob[os.write(self._fd, blob[: self._buffer_size]) :]
        yield b""

    def _send_piece(self, kind: PtmBlobType, piece: bytes) -> None:
        body = PtmSetStateRequest(0, kind, len(piece), piece)
        self.request(PtmCommand.PTM_SET_STATEBLOB, body)


def confirm_device(path: str, absent_hint: str) -> None:
    """Raises FrontendError unless the TPM at *path* answers, or somebody uses it already."""
    try:
        with DeviceControl(path) as device:
            device.request(PtmCommand.PTM_GET_CAPABILITY)
    except OSError as exc:
        if exc.errno == errno.EBUSY:
            return
        hint = absent_hint if exc.errno == errno.ENOENT else "see the log"
        raise FrontendError(f"{path} does not answer: {exc.strerror}", hint) from exc


def _pieces(blob: bytes) -> Iterator[bytes]:
    """Full pieces, then one that is not full and so the last; an empty first one is none yet."""
    if not blob:
        yield b""
    for start in range(0, len(blob) + 1, PTM_STATE_BLOB_SIZE):
        yield blob[start : start + PTM_STATE_BLOB_SIZE]
