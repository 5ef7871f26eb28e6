"""A vTPM on a CUSE character device, from configuration to exit status."""

from __future__ import annotations

import errno
import logging
import os
from typing import TYPE_CHECKING

from vtpm_cuse.errors import FrontendError, UsageError, VtpmError
from vtpm_cuse.service.daemon import run_in_background

if TYPE_CHECKING:
    from collections.abc import Callable

    from vtpm_cuse.device.vtpm import Vtpm
    from vtpm_cuse.frontends.cuse import CuseChannel
    from vtpm_cuse.service.config import CuseConfig

log = logging.getLogger(__name__)

_START_FAILED = 255


def run(config: CuseConfig) -> int:
    """Makes the device and serves it; in the background unless told otherwise.

    Returns the exit status: in the background case, 0 once the device answers.

    Raises:
        VtpmError: What was wrong, before anything was made.
    """
    _prepare_state(config)
    if os.path.lexists(f"/dev/{config.name}"):
        raise UsageError(f"Error: A device '/dev/{config.name}' already exists.", _START_FAILED)

    from vtpm_cuse.frontends.cuse import CuseChannel

    channel = CuseChannel()

    def serve(ready: Callable[[], None]) -> int:
        return _serve(config, channel, ready)

    def confirm() -> None:
        channel.close()  # the device must end with its server
        _confirm_device(config.name)

    if config.foreground:
        return serve(lambda: None)
    return run_in_background(serve, confirm)


def _prepare_state(config: CuseConfig) -> None:
    """This interface makes a missing state directory, and does not start without a location."""
    state = config.vtpm.state
    if state is None:
        reason = "Error: No TPM state directory is defined; TPM_PATH is not set"
        raise UsageError(reason, _START_FAILED, hint="give --tpmstate dir=DIRECTORY")
    scheme, _, path = state.uri.partition("://")
    if scheme == "dir":
        try:
            os.makedirs(path, 0o775, exist_ok=True)
        except OSError as exc:
            reason = f"Error: Could not create the state directory {path}: {exc.strerror}"
            raise UsageError(reason, _START_FAILED) from exc


def _serve(config: CuseConfig, channel: CuseChannel, ready: Callable[[], None]) -> int:
    import trio

    from vtpm_cuse.service.compose import make_vtpm, power_on

    try:
        vtpm = make_vtpm(config.vtpm)
    except VtpmError as exc:
        log.error("%s", exc)
        return 1
    try:
        if not power_on(vtpm, config.vtpm):
            return 0
        trio.run(_serve_device, config, channel, vtpm, ready)
        log.info("CUSE TPM is shutting down.")
    except UsageError as exc:
        log.error("%s", exc)
        return exc.exit_status
    except FrontendError as exc:
        log.error("%s", exc)
        return 1
    except VtpmError:  # said by the vTPM itself
        return _START_FAILED
    finally:
        vtpm.close()
        channel.close()
    return 0


async def _serve_device(
    config: CuseConfig, channel: CuseChannel, vtpm: Vtpm, ready: Callable[[], None]
) -> None:
    import trio

    from vtpm_cuse.device.ptm import PtmService
    from vtpm_cuse.device.worker import Worker
    from vtpm_cuse.frontends.cuse import CuseServer
    from vtpm_cuse.service.pidfile import pid_file
    from vtpm_cuse.service.signals import ending_signals

    await channel.create_device(config.name, config.major, config.minor)
    scope = trio.CancelScope()
    # Signals first: who finds the pid file may send one.
    with ending_signals(scope.cancel), pid_file(config.pid):
        worker = Worker()
        server = CuseServer(channel, vtpm, PtmService(vtpm), worker)
        try:
            with scope:
                log.info("CUSE TPM successfully initialized.")
                ready()
                await server.serve()
        finally:
            await server.settle()
            worker.close()
            # The node and the pid file go last: then state and lock are free for a successor.
            vtpm.close()
            channel.close()


def _confirm_device(name: str) -> None:
    """Raises FrontendError unless /dev/*name* answers."""
    from vtpm_cuse.client.ioctl import DeviceControl
    from vtpm_cuse.wire.ptm import PtmCommand

    path = f"/dev/{name}"
    try:
        with DeviceControl(path) as device:
            device.request(PtmCommand.PTM_GET_CAPABILITY)
    except OSError as exc:
        if exc.errno == errno.EBUSY:  # somebody else already uses it
            return
        hint = "is /dev a devtmpfs?" if exc.errno == errno.ENOENT else "see the log"
        raise FrontendError(f"{path} does not answer: {exc.strerror}", hint) from exc
