"""A vTPM on a character device, or on a TPM device of the kernel's."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Final

from vtpm_cuse.acquire.channels import Channels
from vtpm_cuse.acquire.chardev import ProxyDevice, ProxyMaker, open_device
from vtpm_cuse.acquire.sockets import acquire_control, take_stream
from vtpm_cuse.errors import FrontendError
from vtpm_cuse.service import life
from vtpm_cuse.service.socket import load_channels, serve_channels

if TYPE_CHECKING:
    from collections.abc import Callable

    from vtpm_cuse.config import ChardevConfig
    from vtpm_cuse.serve.worker import Worker
    from vtpm_cuse.vtpm.vtpm import Vtpm

log = logging.getLogger(__name__)

_SHOWN_SECONDS: Final = 10.0
_NODE_SECONDS: Final = 0.2
_LOOK_SECONDS: Final = 0.005


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
        self._made = ""
        self._channels = Channels(control_terminate=config.control_terminate)

    def open(self) -> None:
        config = self._config
        if config.path is not None:
            self._channels.data_stream = open_device(config.path)
        elif config.fd is not None:
            self._channels.data_stream = take_stream(config.fd)
        else:
            self._maker = ProxyMaker(tpm2=config.vtpm.tpm2)
            if config.vtpm.state is not None and config.vtpm.state.own_place:
                life.make_state_directory(config.vtpm, 0o700, config.process.runas, 1)

    def acquire(self) -> None:
        acquire_control(self._channels, self._config.control)

    def load(self) -> None:
        load_channels()

    async def appear(self, vtpm: Vtpm) -> None:
        """Last of all: from then on the kernel waits for answers, and not for long.

        It begins with a self-test, and gives that three seconds on the slowest machine.
        """
        if self._maker is None:
            return
        vtpm.self_test()
        config = self._config.vtpm
        self._channels.data_stream, made = self._maker.make()
        self._made = f"tpm{'rm' if config.tpm2 else ''}{made.tpm_num}"
        numbers = f"(major/minor = {made.major}/{made.minor})"
        self._announce(f"New TPM device: /dev/tpm{made.tpm_num} {numbers}")
        if config.state is not None and config.state.own_place:
            life.introduce(f"/dev/tpm{made.tpm_num}", config)

    async def serve(self, vtpm: Vtpm, worker: Worker, ready: Callable[[], None]) -> None:
        from vtpm_cuse.vtpm.ptm import PtmService

        device = self._channels.data_stream

        async def announce() -> None:
            if self._made and vtpm.running:
                await _shown(self._made)
            ready()

        await serve_channels(self._channels, PtmService(vtpm, self.give_up), worker, announce)
        if isinstance(device, ProxyDevice) and device.gone:
            # PEER: ends with status 0.
            raise FrontendError("The kernel has given the TPM device up", "see dmesg")

    def withdraw(self) -> None:
        self._channels.withdraw()

    def give_up_paths(self) -> list[str]:
        return self._channels.give_up_paths()

    def close(self) -> None:
        self._channels.close()
        if self._maker is not None:
            self._maker.close()


async def _shown(name: str) -> None:
    """Returns when there is a /dev/NAME: the kernel makes it when it has tested the TPM.

    In a container there may be none of the kernel's doing, so sysfs will do, if that can be seen.
    """
    import trio

    folder = f"/sys/class/{name.rstrip('0123456789')}"
    if not _exists("/sys/class"):
        return
    with trio.move_on_after(_SHOWN_SECONDS) as scope:
        while not _exists(f"{folder}/{name}"):  # noqa: ASYNC110 - sysfs announces nothing
            await trio.sleep(_LOOK_SECONDS)
        with trio.move_on_after(_NODE_SECONDS):
            while not _exists(f"/dev/{name}"):  # noqa: ASYNC110
                await trio.sleep(_LOOK_SECONDS)
    if scope.cancelled_caught:
        log.warning("The kernel does not show /dev/%s yet", name)


def _exists(path: str) -> bool:
    return os.path.lexists(path)
