"""A vTPM as a file in a FUSE mount."""

from __future__ import annotations

import logging
import os
import time
from typing import TYPE_CHECKING, Any

from vtpm_cuse.errors import DeviceGone, FrontendError
from vtpm_cuse.service import life
from vtpm_cuse.service.process import logs

if TYPE_CHECKING:
    from collections.abc import Callable

    from vtpm_cuse.config import FuseConfig
    from vtpm_cuse.proto.device import DeviceFile
    from vtpm_cuse.serve.device import Served
    from vtpm_cuse.serve.worker import Worker
    from vtpm_cuse.vtpm.file import TpmDeviceFile
    from vtpm_cuse.vtpm.managed import ManagedFile
    from vtpm_cuse.vtpm.vtpm import Vtpm

log = logging.getLogger(__name__)


def run(config: FuseConfig) -> int:
    """Mounts and serves; in the background unless told otherwise.

    Returns the exit status. The process that has started a background one ends once it answers.

    Raises:
        VtpmError: What was wrong.
    """
    return life.run(_FuseFile(config), config.process, config.vtpm)


class _FuseFile(life.Interface):
    def __init__(self, config: FuseConfig) -> None:
        from vtpm_cuse.acquire.mount import FuseMount

        self._config = config
        self._mount = FuseMount(config.mount, allow_other=config.allow_other)
        self._recent = logs.keep_recent()

    def open(self) -> None:
        config = self._config
        if config.process.runas is None:
            self._mount.take_folder()
        life.make_state_directory(config.vtpm, 0o700, config.process.runas, self.exits.start)

    def acquire(self) -> None:
        """Another user makes the folder and clears up himself: whoever mounts has to own it."""
        if self._config.process.runas is not None:
            self._mount.take_folder()

    def load(self) -> None:
        from vtpm_cuse.proto import fuse
        from vtpm_cuse.serve import device
        from vtpm_cuse.vtpm import attributes, ptm

        _ = attributes, ptm, device, fuse
        time.localtime()  # reads the time zone, which the log of recent messages shows
        # Last, and yet before the TPM is on, for which a client who is quick waits.
        self._mount.mount()

    async def appear(self, _vtpm: Vtpm) -> None:
        await self._mount.answer_init()
        life.introduce(f"{self._config.mount}/{self._config.name}", self._config.vtpm)

    async def serve(self, vtpm: Vtpm, worker: Worker, ready: Callable[[], None]) -> None:
        from vtpm_cuse.serve.device import DeviceServer
        from vtpm_cuse.vtpm.ptm import PtmService

        server = DeviceServer(
            vtpm,
            PtmService(vtpm, self.give_up),
            worker,
            lambda file, managed: [self._session(vtpm, file, managed)],
            managed=vtpm.borrowed or (self._config.managed is not None and vtpm.tpm2),
        )
        ready()
        try:
            await server.serve()
        except DeviceGone:  # the usual way to end a FUSE file system
            log.info("%s was unmounted.", self._config.mount)
        finally:
            await server.settle()

    def _session(self, vtpm: Vtpm, file: TpmDeviceFile, managed: ManagedFile | None) -> Served:
        from vtpm_cuse import __version__
        from vtpm_cuse.proto.fuse import FileOwnership, FuseSession
        from vtpm_cuse.serve.device import Served
        from vtpm_cuse.vtpm.attributes import TpmAttributes

        config, now = self._config, int(time.time())
        status: dict[str, str | int] = {
            "name": config.name,
            "mount": config.mount,
            "pid": os.getpid(),
            "version": __version__,
            "state": config.vtpm.state.uri if config.vtpm.state else "",
            "since": now,
        }
        mode = 0o666 if config.allow_other else 0o600
        devices: dict[str, DeviceFile[Any]] = {config.name: file}
        if managed is not None and vtpm.borrowed:
            devices = {config.name: managed}
        elif managed is not None and config.managed is not None:
            devices[config.managed] = managed
        texts = TpmAttributes(vtpm, file, self._recent, status)
        owner = FileOwnership(os.getuid(), os.getgid(), mode, now)
        return Served(self._mount, FuseSession(devices, texts, owner))

    def close(self) -> None:
        self._mount.close()

    def confirm(self) -> None:
        """Raises FrontendError unless the TPM answers."""
        from vtpm_cuse.client.ioctl import confirm_device

        path = f"{self._config.mount}/{self._config.name}"
        if self._config.vtpm.chip is None:
            confirm_device(path, "see the log")
            return
        try:  # a resource manager's takes no requests
            os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        except OSError as exc:
            reason = f"{path} does not answer: {exc.strerror}"
            raise FrontendError(reason, "see the log") from exc
