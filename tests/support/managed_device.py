"""A vTPM on a device with a resource manager beside it, and its clients."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Self

from tests.kernel.harness import PTM_GET_STATEBLOB, PTM_INIT, PTM_STOP, opened, ptm, ptm_result, u32

if TYPE_CHECKING:
    from pathlib import Path

    from tests.kernel.harness import Server

_VOLATILE = 2


class DeviceClient:
    """One open of a device."""

    def __init__(self, path: Path, flags: int = os.O_RDWR) -> None:
        self.fd = os.open(path, flags)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def send(self, data: bytes) -> None:
        assert os.write(self.fd, data) == len(data)

    def response(self) -> bytes:
        return os.read(self.fd, 4096)

    def command(self, command: bytes) -> bytes:
        self.send(command)
        return self.response()


class DeviceWorld:
    """The devices of a server (`tests.device.managed.World`)."""

    channel = "device"

    def __init__(self, server: Server, managed: Path) -> None:
        self.server = server
        self.managed = managed

    def client(self) -> DeviceClient:
        return DeviceClient(self.managed)

    def raw(self) -> DeviceClient:
        return DeviceClient(self.server.device)

    def init(self) -> int:
        with opened(self.server.device) as fd:
            return ptm_result(fd, PTM_INIT)

    def stop(self) -> None:
        with opened(self.server.device) as fd:
            assert ptm_result(fd, PTM_STOP) == 0

    def volatile_blob(self) -> bytes:
        with opened(self.server.device) as fd:
            answer = ptm(fd, PTM_GET_STATEBLOB, u32(1, _VOLATILE, 0))
        assert answer[:4] == bytes(4)
        return answer[16:]

    def place(self) -> tuple[str, ...]:
        return (str(self.server.device),)

    def tcti(self) -> str:
        return f"device:{self.managed}"
