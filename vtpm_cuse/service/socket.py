"""A vTPM on sockets."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from vtpm_cuse.service import life

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from vtpm_cuse.acquire.channels import Channels
    from vtpm_cuse.config import SocketConfig
    from vtpm_cuse.serve.worker import Worker
    from vtpm_cuse.vtpm.ptm import PtmService
    from vtpm_cuse.vtpm.vtpm import Vtpm


def run(config: SocketConfig) -> int:
    """Serves a vTPM on sockets until it is told to end; returns the exit status.

    Raises:
        VtpmError: What was wrong.
    """
    return life.run(_Sockets(config), config.process, config.vtpm)


class _Sockets(life.Interface):
    sockets = True
    _channels: Channels

    def __init__(self, config: SocketConfig) -> None:
        self._config = config
        self._undo = contextlib.ExitStack()

    def acquire(self) -> None:
        from vtpm_cuse.acquire.sockets import acquire

        self._channels = acquire(self._config)
        self._undo.callback(self._channels.close)

    def load(self) -> None:
        load_channels()

    async def serve(self, vtpm: Vtpm, worker: Worker, ready: Callable[[], None]) -> None:
        from vtpm_cuse.vtpm.ptm import PtmService

        ready()
        await serve_channels(self._channels, PtmService(vtpm, self.give_up), worker)

    def withdraw(self) -> None:
        self._channels.withdraw()

    def give_up_paths(self) -> list[str]:
        return self._channels.give_up_paths()

    def close(self) -> None:
        self._undo.close()


def load_channels() -> None:
    """Imports what `serve_channels` takes."""
    from vtpm_cuse.serve import sockets
    from vtpm_cuse.vtpm import ptm

    _ = ptm, sockets


async def serve_channels(
    channels: Channels,
    ptm: PtmService,
    worker: Worker,
    beside: Callable[[], Awaitable[None]] | None = None,
) -> None:
    """Serves data and control channel until one of them ends the service; calls *beside* then."""
    import trio

    from vtpm_cuse.serve.sockets import SocketServer

    async with trio.open_nursery() as nursery:
        SocketServer(nursery, channels, ptm, worker).start()
        if beside is not None:
            nursery.start_soon(beside)
        await trio.sleep_forever()
