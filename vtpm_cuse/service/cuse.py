"""A vTPM on a CUSE character device."""

from __future__ import annotations

import contextlib
import logging
import os
from typing import TYPE_CHECKING

from vtpm_cuse.errors import UsageError
from vtpm_cuse.service import life
from vtpm_cuse.service.config import Exits

if TYPE_CHECKING:
    from collections.abc import Callable

    from vtpm_cuse.device.vtpm import Vtpm
    from vtpm_cuse.device.worker import Worker
    from vtpm_cuse.frontends.cuse import CuseChannel
    from vtpm_cuse.service.config import CuseConfig

log = logging.getLogger(__name__)

_START_FAILED = 255


def run(config: CuseConfig) -> int:
    """Makes the device and serves it; in the background unless told otherwise.

    Returns the exit status: in the background case, 0 once the device answers.

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
        self._prepare_state()
        if os.path.lexists(f"/dev/{self._config.name}"):
            reason = f"Error: A device '/dev/{self._config.name}' already exists."
            raise UsageError(reason, _START_FAILED)

        from vtpm_cuse.frontends.cuse import CuseChannel, open_cuse

        self._channel = CuseChannel(open_cuse())
        self._undo.callback(self._channel.close)

    def _prepare_state(self) -> None:
        """This interface makes a missing directory, and does not start without a location."""
        if self._config.vtpm.state is None:
            reason = "Error: No TPM state directory is defined; TPM_PATH is not set"
            raise UsageError(reason, _START_FAILED, hint="give --tpmstate dir=DIRECTORY")
        life.make_state_directory(
            self._config.vtpm, 0o775, self._config.process.runas, _START_FAILED
        )

    def load(self) -> None:
        from vtpm_cuse.device import ptm
        from vtpm_cuse.frontends import device

        _ = ptm, device

    async def appear(self) -> None:
        config = self._config
        await self._channel.create_device(config.name, config.major, config.minor)
        log.info("CUSE TPM successfully initialized.")

    async def serve(self, vtpm: Vtpm, worker: Worker, ready: Callable[[], None]) -> None:
        from vtpm_cuse.device.ptm import PtmService
        from vtpm_cuse.frontends.device import DeviceServer

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
        """Raises FrontendError unless the device answers."""
        from vtpm_cuse.client.ioctl import confirm_device

        confirm_device(f"/dev/{self._config.name}", "is /dev a devtmpfs?")
