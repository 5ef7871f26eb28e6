"""A vTPM on sockets, from configuration to exit status."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from vtpm_cuse.errors import UsageError, VtpmError
from vtpm_cuse.service.daemon import run_in_background

if TYPE_CHECKING:
    from collections.abc import Callable

    from vtpm_cuse.device.vtpm import Vtpm
    from vtpm_cuse.frontends.sockets import Channels
    from vtpm_cuse.service.config import SocketConfig

log = logging.getLogger(__name__)


def run(config: SocketConfig) -> int:
    """Serves a vTPM until it is told to end; returns the exit status.

    With ``daemon``, the calling process returns when the sockets are bound, the pid file is
    written and, where asked for, the TPM is started.

    Raises:
        VtpmError: What was wrong.
    """
    if config.daemon:
        return run_in_background(lambda ready: _serve(config, ready), lambda: None)
    return _serve(config, lambda: None)


def _serve(config: SocketConfig, ready: Callable[[], None]) -> int:
    from vtpm_cuse.service.listen import acquire

    try:
        channels = acquire(config)
        try:
            return _serve_channels(config, channels, ready)
        finally:
            channels.close()
    except UsageError as exc:
        log.error("%s", exc)
        return exc.exit_status
    except VtpmError as exc:
        log.error("%s", exc)
        return 1


def _serve_channels(config: SocketConfig, channels: Channels, ready: Callable[[], None]) -> int:
    import trio

    from vtpm_cuse.service.compose import make_vtpm, power_on
    from vtpm_cuse.service.pidfile import pid_file

    vtpm = make_vtpm(config.vtpm)
    try:
        with pid_file(config.pid):
            if power_on(vtpm, config.vtpm):
                trio.run(_serve_tasks, channels, vtpm, ready)
    finally:
        vtpm.close()
    return 0


async def _serve_tasks(channels: Channels, vtpm: Vtpm, ready: Callable[[], None]) -> None:
    import trio

    from vtpm_cuse.device.ptm import PtmService
    from vtpm_cuse.device.worker import Worker
    from vtpm_cuse.frontends.sockets import SocketServer
    from vtpm_cuse.service.signals import cancel_on_signal

    worker = Worker()
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(cancel_on_signal, nursery.cancel_scope)
            SocketServer(nursery, channels, vtpm, PtmService(vtpm), worker).start()
            ready()
            await trio.sleep_forever()
    finally:
        worker.close()
