"""A vTPM on a character device, or on a TPM device of the kernel's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vtpm_cuse.acquire.chardev import ProxyDevice, ProxyMaker, open_device
from vtpm_cuse.acquire.endpoints import Endpoints
from vtpm_cuse.acquire.sockets import acquire_control, acquire_managed, take_stream
from vtpm_cuse.acquire.watcher import DeviceWatcher
from vtpm_cuse.errors import FrontendError
from vtpm_cuse.service import life
from vtpm_cuse.service.process.behalf import opening
from vtpm_cuse.service.socket import load_endpoints, serve_endpoints

if TYPE_CHECKING:
    from collections.abc import Callable

    from vtpm_cuse.config import ChardevConfig
    from vtpm_cuse.serve.worker import Worker
    from vtpm_cuse.vtpm.vtpm import Vtpm


def run(config: ChardevConfig, announce: Callable[[str], None]) -> int:
    """Serves a vTPM on a device until that ends; returns the exit status.

    Args:
        config: What is wanted.
        announce: Called with the line that names a new device of the kernel's.

    Raises:
        VtpmError: What was wrong.
    """
    return life.run(_Chardev(config, announce), config.process, config.vtpm)


class _Chardev(life.Interface):
    sockets = True

    def __init__(self, config: ChardevConfig, announce: Callable[[str], None]) -> None:
        self._config = config
        self._announce = announce
        self._maker: ProxyMaker | None = None
        self._made = -1
        self._watcher: DeviceWatcher | None = None
        self._endpoints = Endpoints(control_terminate=config.control_terminate)

    def open(self) -> None:
        config = self._config
        if config.path is not None:
            with opening(config.process.runas, config.path):
                self._endpoints.data_stream = open_device(config.path)
        elif config.fd is not None:
            self._endpoints.data_stream = take_stream(config.fd)
        else:
            self._maker = ProxyMaker(tpm2=config.vtpm.tpm2)
            if self.awaited:
                self._watcher = DeviceWatcher(tpm2=config.vtpm.tpm2)
            if config.vtpm.state is not None and config.vtpm.state.own_place:
                life.make_state_directory(config.vtpm, 0o700, config.process.runas, 1)

    def acquire(self) -> None:
        acquire_control(self._endpoints, self._config.control)
        acquire_managed(self._endpoints, self._config.managed)

    def load(self) -> None:
        load_endpoints(self._endpoints)

    async def appear(self, vtpm: Vtpm) -> None:
        """Last of all: from then on the kernel waits for answers, and not for long.

        It begins with a self-test, and gives that three seconds on the slowest machine.
        """
        if self._maker is None:
            return
        vtpm.self_test()
        config = self._config.vtpm
        self._endpoints.data_stream, made = self._maker.make()
        self._made = made.tpm_num
        numbers = f"(major/minor = {made.major}/{made.minor})"
        self._announce(f"New TPM device: /dev/tpm{made.tpm_num} {numbers}")
        if config.state is not None and config.state.own_place:
            life.introduce(f"/dev/tpm{made.tpm_num}", config)

    async def serve(self, vtpm: Vtpm, worker: Worker, ready: Callable[[], None]) -> None:
        from vtpm_cuse.vtpm.ptm import PtmService

        device, made = self._endpoints.data_stream, self._made

        async def announce() -> None:
            if self._watcher is not None and vtpm.running:
                await self._watcher.shown(made)
            ready()
            if self._watcher is not None:
                self._watcher.close()

        await serve_endpoints(self._endpoints, PtmService(vtpm, self.give_up), worker, announce)
        if isinstance(device, ProxyDevice) and device.gone:
            # PEER: ends with status 0.
            raise FrontendError("The kernel has given the TPM device up", "see dmesg")

    def withdraw(self) -> None:
        self._endpoints.withdraw()

    def give_up_paths(self) -> list[str]:
        return self._endpoints.give_up_paths()

    def close(self) -> None:
        self._endpoints.close()
        for helper in (self._maker, self._watcher):
            if helper is not None:
                helper.close()
