"""A vTPM on a CUSE character device."""

from __future__ import annotations

import contextlib
import logging
import os
from typing import TYPE_CHECKING

from vtpm_cuse.config import Exits
from vtpm_cuse.errors import FrontendError, UsageError
from vtpm_cuse.service import life

if TYPE_CHECKING:
    from collections.abc import Callable

    from vtpm_cuse.acquire.cuse import CuseChannel
    from vtpm_cuse.config import CuseConfig
    from vtpm_cuse.serve.worker import Worker
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
    _channel: CuseChannel

    def __init__(self, config: CuseConfig) -> None:
        self._config = config
        self._undo = contextlib.ExitStack()

    def open(self) -> None:
        if os.path.lexists(f"/dev/{self._config.name}"):
            reason = f"Error: A device '/dev/{self._config.name}' already exists."
            raise UsageError(reason, _START_FAILED)

        from vtpm_cuse.acquire.cuse import CuseChannel, open_cuse

        self._channel = CuseChannel(open_cuse())
        self._undo.callback(self._channel.close)
        runas = self._config.process.runas
        life.make_state_directory(self._config.vtpm, 0o775, runas, _START_FAILED)

    def load(self) -> None:
        from vtpm_cuse.serve import device
        from vtpm_cuse.vtpm import ptm

        _ = ptm, device

    async def appear(self, _vtpm: Vtpm) -> None:
        config = self._config
        await self._channel.create_device(config.name, config.major, config.minor)
        log.info("CUSE TPM successfully initialized.")
        if config.vtpm.state is not None and config.vtpm.state.own_place:
            life.introduce(f"/dev/{config.name}", config.vtpm)

    async def serve(self, vtpm: Vtpm, worker: Worker, ready: Callable[[], None]) -> None:
        from vtpm_cuse.serve.device import DeviceServer
        from vtpm_cuse.vtpm.ptm import PtmService

        server = DeviceServer(self._channel, vtpm, PtmService(vtpm, self.give_up), worker)
        ready()
        try:
            await server.serve()
        finally:
            await server.settle()
            log.info("CUSE TPM is shutting down.")

    def close(self) -> None:
        self._undo.close()

    def confirm(self) -> None:
        """Raises FrontendError unless the device is there.

        It is not opened: a client that comes now would find it in use.
        """
        path = f"/dev/{self._config.name}"
        if self._config.node_in_sight and not os.path.exists(path):
            raise FrontendError(f"The kernel's device {path} is not there", "is /dev a devtmpfs?")
