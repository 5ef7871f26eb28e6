"""A vTPM on sockets, from configuration to exit status."""

from __future__ import annotations

import contextlib
import gc
import logging
from typing import TYPE_CHECKING, Final

from vtpm_cuse.errors import PtmError, VtpmError
from vtpm_cuse.service.daemon import run_in_background
from vtpm_cuse.wire.ptm import PtmResult

if TYPE_CHECKING:
    from collections.abc import Callable

    from vtpm_cuse.device.vtpm import Vtpm
    from vtpm_cuse.frontends.channels import Channels
    from vtpm_cuse.service.config import SocketConfig

log = logging.getLogger(__name__)

_ERROR: Final = 1


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
    gc.disable()  # until the service runs: start-up makes no garbage, 8 of 90 ms
    try:
        _serve_config(config, ready)
    except PtmError:  # said by the vTPM itself
        return _ERROR
    except VtpmError as exc:
        log.error("%s", exc)
        return _ERROR
    finally:
        gc.enable()
    return 0


def _serve_config(config: SocketConfig, ready: Callable[[], None]) -> None:
    from vtpm_cuse.service.listen import acquire

    with contextlib.ExitStack() as stack:
        # Before anything that takes time: who polls for the sockets need not wait.
        channels = acquire(config)
        stack.callback(channels.close)

        import trio

        from vtpm_cuse.service.compose import make_vtpm, power_on

        vtpm = make_vtpm(config.vtpm)
        stack.callback(vtpm.close)
        if power_on(vtpm, config.vtpm):
            trio.run(_serve_tasks, config, channels, vtpm, ready)
        if vtpm.state_lost:  # PEER: ends with status 0
            raise PtmError(PtmResult.TPM_FAIL, "The state is another process'")


async def _serve_tasks(
    config: SocketConfig, channels: Channels, vtpm: Vtpm, ready: Callable[[], None]
) -> None:
    import trio

    from vtpm_cuse.device.ptm import PtmService
    from vtpm_cuse.device.worker import Worker
    from vtpm_cuse.frontends.sockets import SocketServer
    from vtpm_cuse.service.pidfile import pid_file
    from vtpm_cuse.service.signals import ending_signals

    scope = trio.CancelScope()
    # Signals first: who finds the pid file may send one.
    with ending_signals(scope.cancel), pid_file(config.pid):
        worker = Worker()
        try:
            with scope:
                async with trio.open_nursery() as nursery:
                    SocketServer(nursery, channels, vtpm, PtmService(vtpm), worker).start()
                    gc.freeze()  # what start-up made stays
                    gc.enable()
                    ready()
                    await trio.sleep_forever()
        finally:
            worker.close()
            # The pid file goes last: then sockets, state and lock are free for a successor.
            vtpm.close()
            channels.close()
