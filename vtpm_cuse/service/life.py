"""The life of a process that serves a vTPM, the same for every interface.

Acquire, drop privileges, sandbox, serve. An interface says what it does at each step as a
subclass of `Interface`; `run` sees to the order, to background, signals and pid file, and to an
end that leaves state and lock free for a successor.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
from typing import TYPE_CHECKING

from vtpm_cuse.errors import PtmError, UsageError, VtpmError
from vtpm_cuse.service.daemon import run_in_background
from vtpm_cuse.wire.ptm import PtmResult

if TYPE_CHECKING:
    from collections.abc import Callable

    from vtpm_cuse.device.vtpm import Vtpm
    from vtpm_cuse.device.worker import Worker
    from vtpm_cuse.service.config import ProcessConfig, VtpmConfig

log = logging.getLogger(__name__)


class Interface:
    """One way to serve a vTPM; the methods are called once each, in the order they have here."""

    start_failed = 1
    """Exit status when the TPM cannot be started."""

    pid_failed = 1
    """Exit status when the pid file cannot be written."""

    def open(self) -> None:
        """Opens what needs the caller's privileges, such as a device.

        Raises:
            VtpmError: It cannot be had.
        """

    def acquire(self) -> None:
        """Makes what is to belong to the user served as, such as sockets; no TPM is there yet.

        Raises:
            VtpmError: It cannot be had.
        """

    async def appear(self) -> None:
        """Shows the device, if that takes a TPM which is there and on.

        Raises:
            VtpmError: It cannot be made.
        """

    async def serve(self, vtpm: Vtpm, worker: Worker) -> None:
        """Serves until the end; no path can be opened any more but the state, no socket made.

        Cancelled by signals. Returns with no command running.

        Raises:
            VtpmError: What is served has gone away.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Gives up everything; may be called at any time, and again."""

    def confirm(self) -> None:
        """In the process that started a background one, once that is ready: does it answer?

        Raises:
            VtpmError: It does not; the background process is told to end.
        """


def make_state_directory(config: VtpmConfig, mode: int, exit_status: int) -> None:
    """For the interfaces that make a missing one. Raises UsageError with the *exit_status*."""
    scheme, _, path = config.state.uri.partition("://") if config.state else ("", "", "")
    if scheme == "dir":
        try:
            os.makedirs(path, mode, exist_ok=True)
        except OSError as exc:
            reason = f"Error: Could not create the state directory {path}: {exc.strerror}"
            raise UsageError(reason, exit_status) from exc


def run(interface: Interface, process: ProcessConfig, vtpm: VtpmConfig) -> int:
    """Serves a vTPM until it is told to end; returns the exit status.

    In the background case the calling process returns when clients are served.

    Raises:
        VtpmError: What was wrong.
    """
    if process.background:
        return run_in_background(
            lambda ready: _live(interface, process, vtpm, ready), interface.confirm
        )
    return _live(interface, process, vtpm, lambda: None)


def _live(
    interface: Interface, process: ProcessConfig, config: VtpmConfig, ready: Callable[[], None]
) -> int:
    gc.disable()  # until the service runs: start-up makes no garbage, 8 of 90 ms
    try:
        with contextlib.ExitStack() as stack:
            stack.callback(interface.close)
            interface.open()
            # Before anything that takes time: who polls for a socket need not wait.
            interface.acquire()

            import trio

            from vtpm_cuse.service.compose import make_vtpm, power_on

            vtpm = make_vtpm(config)
            stack.callback(vtpm.close)
            if power_on(vtpm, config):
                trio.run(_serve, interface, process, vtpm, ready)
            if vtpm.state_lost:  # PEER: ends with status 0
                raise PtmError(PtmResult.TPM_FAIL, "The state is another process'")
    except PtmError:  # said by the vTPM itself
        return interface.start_failed
    except VtpmError as exc:
        from vtpm_cuse import faults

        log.error("%s", exc)
        return faults.exit_status(exc)
    finally:
        gc.enable()
    return 0


async def _serve(
    interface: Interface, process: ProcessConfig, vtpm: Vtpm, ready: Callable[[], None]
) -> None:
    import trio

    from vtpm_cuse.device.worker import Worker
    from vtpm_cuse.service.pidfile import pid_file
    from vtpm_cuse.service.signals import ending_signals

    await interface.appear()
    scope = trio.CancelScope()
    # Signals first: who finds the pid file may send one.
    with ending_signals(scope.cancel), pid_file(process.pid, interface.pid_failed):
        worker = Worker()
        try:
            with scope:
                gc.freeze()  # what start-up made stays
                gc.enable()
                ready()
                await interface.serve(vtpm, worker)
        finally:
            worker.close()
            # The pid file goes last: then the interface, state and lock are free for a successor.
            vtpm.close()
            interface.close()
