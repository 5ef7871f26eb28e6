"""The ioctl client against the device's own code, joined without a kernel."""

from __future__ import annotations

import errno
import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtpm_cuse.client import ioctl as client
from vtpm_cuse.client.ioctl import DeviceControl
from vtpm_cuse.errors import AnswerError, DeviceError, WireError
from vtpm_cuse.vtpm.file import TpmDeviceFile
from vtpm_cuse.vtpm.ptm import PtmService
from vtpm_cuse.vtpm.turn import Turn
from vtpm_cuse.wire.ptm import PTM_IOCTLS, PtmBlobType, PtmCommand, PtmInitRequest, PtmStateFlag

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from vtpm_cuse.vtpm.vtpm import Vtpm

PERMANENT = PtmBlobType.PTM_BLOB_TYPE_PERMANENT
DECRYPTED = PtmStateFlag.PTM_STATE_FLAG_DECRYPTED


class BlobTpm:
    """As much of a Vtpm as state blobs need."""

    borrowed = False

    def __init__(self) -> None:
        self.running = True
        self.blob = b""
        self.imported: list[tuple[int, bytes]] = []

    def export_blob(self, _kind: int, *, decrypted: bool) -> tuple[int, bytes]:
        assert decrypted
        return 0, self.blob

    def import_blob(self, kind: int, flags: int, data: bytes) -> None:
        assert flags == 0
        self.imported.append((kind, data))


class JoinedDevice:
    """Stands for os and fcntl in the client and calls the device file instead of the kernel."""

    O_RDWR, O_CLOEXEC = os.O_RDWR, os.O_CLOEXEC

    def __init__(self) -> None:
        self.tpm = BlobTpm()
        vtpm = cast("Vtpm", self.tpm)
        file = TpmDeviceFile(vtpm, PtmService(vtpm), Turn(lambda _job, _done: None), lambda: None)
        self.client = file.open()
        self.transfers: list[str] = []

    def open(self, _path: str, _flags: int) -> int:
        return os.open(os.devnull, os.O_RDWR)

    def fstat(self, fd: int) -> os.stat_result:
        return os.fstat(fd)

    def close(self, fd: int) -> None:
        os.close(fd)

    def ioctl(self, _fd: int, number: int, argument: bytearray) -> None:
        self.transfers.append(PTM_IOCTLS[number].name)
        try:
            answer = self.client.ioctl(number, bytes(argument), 0, 0)
        except DeviceError as exc:
            raise OSError(exc.errno, os.strerror(exc.errno)) from exc
        assert isinstance(answer, bytes)
        argument[: len(answer)] = answer

    def read(self, _fd: int, size: int) -> bytes:
        self.transfers.append("read")
        answer = self.client.read(size, nonblocking=False)
        assert isinstance(answer, bytes)
        return answer

    def write(self, _fd: int, data: bytes) -> int:
        self.transfers.append("write")
        taken = data[:65536]  # a device may take less than it is given
        self.client.write(taken)
        return len(taken)


@contextmanager
def joined_device() -> Iterator[JoinedDevice]:
    """A device that every `DeviceControl` opens."""
    device = JoinedDevice()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client, "os", device)
        patch.setattr(client, "fcntl", device)
        yield device


SIZES = st.one_of(
    st.integers(0, 20000), st.sampled_from([0, 1, 3071, 3072, 3073, 6144, 9216, 70000])
)
BUFFERS = st.sampled_from([0, 100, 3072, 4096, 100000])


@given(SIZES, BUFFERS)
def test_a_blob_comes_out_whole(size: int, buffer: int) -> None:
    with joined_device() as device, DeviceControl("/dev/x", buffer) as tpm:
        device.tpm.blob = os.urandom(size)
        assert tpm.get_state(PERMANENT, DECRYPTED) == device.tpm.blob


@given(SIZES, BUFFERS)
def test_a_blob_goes_in_whole(size: int, buffer: int) -> None:
    blob = os.urandom(size)
    with joined_device() as device, DeviceControl("/dev/x", buffer) as tpm:
        device.tpm.running = False
        tpm.set_state(PERMANENT, blob)
        assert device.tpm.imported == [(PERMANENT, blob)]


def test_the_buffer_size_chooses_read_and_write() -> None:
    with joined_device() as device, DeviceControl("/dev/x", 4096) as tpm:
        device.tpm.blob = bytes(7000)
        tpm.get_state(PERMANENT, DECRYPTED)
        assert device.transfers == ["PTM_GET_STATEBLOB", "read"]
        device.tpm.running = False
        device.transfers.clear()
        tpm.set_state(PERMANENT, bytes(7000))
        assert device.transfers == ["PTM_SET_STATEBLOB", "write", "write", "PTM_SET_STATEBLOB"]


def test_answers_and_refusals() -> None:
    with joined_device() as device, DeviceControl("/dev/x") as tpm:
        assert tpm.capability() == 0x16FFF
        with pytest.raises(AnswerError, match="TPM result from PTM_SET_STATEBLOB: 0xa") as refused:
            tpm.set_state(PERMANENT, b"x")
        assert refused.value.result == 0xA
        device.tpm.running = False
        with pytest.raises(AnswerError, match="TPM result from PTM_GET_STATEBLOB: 0xa"):
            tpm.get_state(PERMANENT, DECRYPTED)
        with pytest.raises(OSError, match="Invalid argument"):
            tpm.request(PtmCommand.PTM_SET_DATAFD)


def test_opens_only_character_devices(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"precious")
    with pytest.raises(OSError, match="Neither a character device nor a TPM") as info:
        DeviceControl(str(path))
    assert info.value.errno == errno.ENODEV
    with pytest.raises(FileNotFoundError):
        DeviceControl(str(tmp_path / "nothing"))


def test_a_device_of_another_kind_refuses() -> None:
    with DeviceControl(os.devnull) as tpm, pytest.raises(OSError, match="Inappropriate ioctl"):
        tpm.request(PtmCommand.PTM_INIT, PtmInitRequest(0))
    tpm.close()  # again is harmless


@pytest.mark.parametrize("buffer", [0, 100])
def test_a_blob_that_ends_early_is_no_blob(buffer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that lacks its end would be found out when it is needed."""
    with joined_device() as device, DeviceControl("/dev/x", buffer) as tpm:
        device.tpm.blob = bytes(9000)
        whole = device.ioctl

        def cut(fd: int, number: int, argument: bytearray) -> None:
            whole(fd, number, argument)
            argument[12:16] = (100).to_bytes(4, sys.byteorder)

        monkeypatch.setattr(device, "ioctl", cut)
        monkeypatch.setattr(device, "read", lambda _fd, _size: b"")
        with pytest.raises(WireError, match="State blob: 9000 bytes needed, 100 there"):
            tpm.get_state(PERMANENT, DECRYPTED)
