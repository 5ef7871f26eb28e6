"""A vTPM on a CUSE character device."""

from __future__ import annotations

import contextlib
import logging
import os
from typing import TYPE_CHECKING, Any

from vtpm_cuse.config import Exits
from vtpm_cuse.errors import FrontendError, UsageError
from vtpm_cuse.service import life

if TYPE_CHECKING:
    from collections.abc import Callable

    from vtpm_cuse.acquire.cuse import CuseChannel
    from vtpm_cuse.config import CuseConfig
    from vtpm_cuse.proto.device import DeviceFile
    from vtpm_cuse.serve.device import Served
    from vtpm_cuse.serve.worker import Worker
    from vtpm_cuse.vtpm.file import TpmDeviceFile
    from vtpm_cuse.vtpm.managed import ManagedFile
    from vtpm_cuse.vtpm.vtpm import Vtpm

log = logging.getLogger(__name__)

_START_FAILED = 255


def run(config: CuseConfig) -> int:
    """Makes the device and serves it; in the background unless told otherwise.

    Returns the exit status. The process that has started a background one ends once it answers.

    Raises:
        VtpmError: What was wrong.
    """
    return life.run(_CuseDevice(config), config.process, config.vtpm)


class _CuseDevice(life.Interface):
    exits = Exits(start=_START_FAILED, pid=243, groups=246, gid=245, uid=244, sandbox=242)

    def __init__(self, config: CuseConfig) -> None:
        self._config = config
        self._names = [config.name, *([config.managed] if config.managed else [])]
        self._channels: dict[str, CuseChannel] = {}
        self._undo = contextlib.ExitStack()

    def open(self) -> None:
        for name in self._names:
            if os.path.lexists(f"/dev/{name}"):
                raise UsageError(f"Error: A device '/dev/{name}' already exists.", _START_FAILED)

        from vtpm_cuse.acquire.cuse import CuseChannel, open_cuse

        for name in self._names:
            channel = CuseChannel(open_cuse())
            self._undo.callback(channel.close)
            self._channels[name] = channel
        runas = self._config.process.runas
        life.make_state_directory(self._config.vtpm, 0o775, runas, _START_FAILED)

    def load(self) -> None:
        from vtpm_cuse.serve import device
        from vtpm_cuse.vtpm import ptm

        _ = ptm, device
        # Before a byte of state is read: who answers the kernel here says what it may do with the
        # memory of clients. One who is quick waits for the TPM, and who sees one device finds both.
        config = self._config
        if config.managed:
            self._channels[config.managed].create_device(config.managed, 0, 0)
        self._channels[config.name].create_device(config.name, config.major, config.minor)

    async def appear(self, _vtpm: Vtpm) -> None:
        config = self._config
        log.info("CUSE TPM successfully initialized.")
        if config.vtpm.chip or (config.vtpm.state is not None and config.vtpm.state.own_place):
            life.introduce(f"/dev/{config.name}", config.vtpm)

    async def serve(self, vtpm: Vtpm, worker: Worker, ready: Callable[[], None]) -> None:
        from vtpm_cuse.serve.device import DeviceServer
        from vtpm_cuse.vtpm.ptm import PtmService

        server = DeviceServer(
            vtpm,
            PtmService(vtpm, self.give_up),
            worker,
            self._sessions,
            managed=vtpm.borrowed or self._config.managed is not None,
        )
        ready()
        try:
            await server.serve()
        finally:
            await server.settle()
            log.info("CUSE TPM is shutting down.")

    def _sessions(self, file: TpmDeviceFile, managed: ManagedFile | None) -> list[Served]:
        from vtpm_cuse.proto.device import DeviceSession
        from vtpm_cuse.serve.device import Served

        files: list[DeviceFile[Any]] = [file, *([managed] if managed else [])]
        if managed and len(self._channels) < len(files):  # in front of a chip
            files = [managed]
        return [
            Served(channel, DeviceSession(file))
            for channel, file in zip(self._channels.values(), files, strict=True)
        ]

    def close(self) -> None:
        self._undo.close()

    def confirm(self) -> None:
        """Raises FrontendError unless the device is there.

        It is not opened: a client that comes now would find it in use.
        """
        path = f"/dev/{self._config.name}"
        if self._config.node_in_sight and not os.path.exists(path):
            raise FrontendError(f"The kernel's device {path} is not there", "is /dev a devtmpfs?")
