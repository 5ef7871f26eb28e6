"""A vTPM on sockets."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from vtpm_cuse.service import life

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from vtpm_cuse.acquire.endpoints import Endpoints
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
    _endpoints: Endpoints

    def __init__(self, config: SocketConfig) -> None:
        self._config = config
        self._undo = contextlib.ExitStack()

    def acquire(self) -> None:
        from vtpm_cuse.acquire.sockets import acquire

        self._endpoints = acquire(self._config)
        self._undo.callback(self._endpoints.close)

    def load(self) -> None:
        load_endpoints(self._endpoints)

    async def serve(self, vtpm: Vtpm, worker: Worker, ready: Callable[[], None]) -> None:
        from vtpm_cuse.vtpm.ptm import PtmService

        ready()
        await serve_endpoints(self._endpoints, PtmService(vtpm, self.give_up), worker)

    def withdraw(self) -> None:
        self._endpoints.withdraw()

    def give_up_paths(self) -> list[str]:
        return self._endpoints.give_up_paths()

    def close(self) -> None:
        self._undo.close()


def load_endpoints(endpoints: Endpoints) -> None:
    """Imports and makes what `serve_endpoints` takes."""
    from vtpm_cuse.serve import sockets
    from vtpm_cuse.vtpm import ptm

    _ = ptm, sockets
    if endpoints.managed_listener is not None:
        from vtpm_cuse.serve import managed_sockets

        _ = managed_sockets, endpoints.epoll


async def serve_endpoints(
    endpoints: Endpoints,
    ptm: PtmService,
    worker: Worker,
    beside: Callable[[], Awaitable[None]] | None = None,
) -> None:
    """Serves data and control channel until one of them ends the service; calls *beside* then."""
    import trio

    from vtpm_cuse.serve.sockets import SocketServer

    async with trio.open_nursery() as nursery:
        SocketServer(nursery, endpoints, ptm, worker).start()
        if beside is not None:
            nursery.start_soon(beside)
        await trio.sleep_forever()
