"""The life of a process that serves a vTPM, the same for every interface.

Acquire, drop privileges, sandbox, power on, serve: whoever takes over libtpms by a state that he has
prepared finds himself in the sandbox. An interface says what it does at each step as a subclass of
`Interface`; `run` sees to the order, to background, signals and pid file, and to an
end that leaves state and lock free for a successor.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import mmap
import os
import threading
from typing import TYPE_CHECKING, Final

from vtpm_cuse import faults
from vtpm_cuse.config import Exits
from vtpm_cuse.errors import FrontendError, TpmUnavailable, UsageError, VtpmError
from vtpm_cuse.files import check_private, make_folder
from vtpm_cuse.service.process import notify
from vtpm_cuse.service.process.behalf import making_folder, opening
from vtpm_cuse.service.process.daemon import run_in_background
from vtpm_cuse.service.process.held import HeldSignals
from vtpm_cuse.service.process.pidfile import PidFile
from vtpm_cuse.service.remover import Remover
from vtpm_cuse.wire.ptm import PtmResult

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vtpm_cuse.config import ProcessConfig, User, VtpmConfig
    from vtpm_cuse.serve.worker import Worker
    from vtpm_cuse.vtpm.vtpm import Vtpm

log = logging.getLogger(__name__)

_LIMIT_HINT: Final = "raise the limit: 'ulimit -u', or TasksMax= of a unit"
_HELPERS: Final = 2
"""Threads and processes that are to come: the worker, the remover."""
_GONE_SECONDS: Final = 1.0
"""For whoever waits for an answer when a borrowed TPM has gone away."""
_MEMORY: Final = 32 << 20
"""Bytes, about what serving takes besides what it has at the start."""


class Interface:
    """One way to serve a vTPM; `open` to `serve` are called once each, in the order they have here."""

    exits = Exits()
    give_up: Callable[[], None]
    """For `serve`: gives up what a successor needs, before a requested end is answered."""
    awaited = False
    """Whether somebody waits for it to be ready: the process that started it, a service manager."""
    sockets = False
    """Whether it accepts clients on sockets."""

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

    def load(self) -> None:
        """Does the last of what the sandbox refuses: it imports and starts what later steps take."""

    async def appear(self, vtpm: Vtpm) -> None:
        """Shows the device, in the sandbox, if that takes a TPM which is there and on.

        Raises:
            VtpmError: It cannot be made.
        """

    async def serve(self, vtpm: Vtpm, worker: Worker, ready: Callable[[], None]) -> None:
        """Serves until the end; no path can be opened any more but the state, no socket made.

        Calls *ready* when who was told of it can use the TPM.

        Cancelled by signals. Returns with no command running.

        Raises:
            VtpmError: What is served has gone away.
        """
        raise NotImplementedError

    def withdraw(self) -> None:
        """Gives up the names it is found by, if a client can be answered without them."""

    def close(self) -> None:
        """Gives up everything; may be called at any time, and again.

        In the end it is called within the sandbox: it can close, and neither remove nor start
        anything.
        """

    def give_up_paths(self) -> list[str]:
        """The sockets that `close` would remove; it no longer does, a `Remover` will."""
        return []

    def confirm(self) -> None:
        """In the process that started a background one, once that is ready: does it answer?

        Raises:
            VtpmError: It does not; the background process is told to end.
        """


def make_state_directory(
    config: VtpmConfig, mode: int, owner: User | None, exit_status: int
) -> None:
    """For the interfaces that make a missing one. Raises UsageError with the *exit_status*."""
    if config.state is None or not (path := config.state.location.folder_to_make):
        return
    try:
        if config.state.own_place:
            mode = 0o700
        with making_folder(owner, path) as ids:
            make_folder(path, mode, ids)
    except OSError as exc:
        reason = f"Error: Could not create the state directory {path}: {exc.strerror}"
        raise UsageError(reason, exit_status) from exc
    if config.state.own_place:
        try:
            check_private(path, owner.uid if owner else os.geteuid())
        except OSError as exc:
            reason = f"Error: The state directory {path} cannot be used: {exc.strerror}"
            raise UsageError(
                reason, exit_status, "mend that, or name another by --tpmstate dir=DIR"
            ) from exc


def introduce(device: str, config: VtpmConfig) -> None:
    """Says what has come to be: the device, the version of the TPM, where its state is."""
    if config.chip is not None:
        log.info("%s is a resource manager of the TPM at %s.", device, config.chip.path)
        return
    where = config.state.location.path or "memory" if config.state else "nowhere"
    version = "2.0" if config.tpm2 else "1.2"
    log.info("%s is a TPM %s, whose state is in %s.", device, version, where)


def run(interface: Interface, process: ProcessConfig, vtpm: VtpmConfig) -> int:
    """Serves a vTPM until it is told to end; returns the exit status.

    In the background case the calling process ends when clients are served.

    Raises:
        VtpmError: What was wrong.
    """
    _check_memory()
    held = HeldSignals()  # before anything is made that has to be removed again
    life = _Life(interface, process, vtpm, held)
    try:
        if process.background:
            return run_in_background(life.live, life.part, held)
        return life.live(lambda: None)
    except BlockingIOError as exc:  # of fork()
        raise UsageError("Error: No other process can be started", hint=_LIMIT_HINT) from exc
    finally:
        held.release()


def _check_memory() -> None:
    """Raises UsageError where there is too little: Python may then loop for ever, or show how it ends."""
    try:
        mmap.mmap(-1, _MEMORY, prot=mmap.PROT_READ).close()
    except OSError as exc:
        hint = "raise the limit: 'ulimit -v', or LimitAS= of a unit"
        raise UsageError("Error: There is too little memory", hint=hint) from exc


def _check_threads() -> None:
    """They are needed later on, when a client may be there already. Raises UsageError."""
    enough = threading.Event()
    threads = [threading.Thread(target=enough.wait) for _ in range(_HELPERS)]
    try:
        with _starting_threads():
            for thread in threads:
                thread.start()
    finally:
        enough.set()
    for thread in threads:
        thread.join()


@contextlib.contextmanager
def _starting_threads() -> Iterator[None]:
    try:
        yield
    except RuntimeError as exc:
        raise UsageError("Error: No thread can be started", hint=_LIMIT_HINT) from exc


class _Life:
    _manager: notify.ServiceManager
    _chip: int | None = None

    def __init__(
        self, interface: Interface, process: ProcessConfig, config: VtpmConfig, held: HeldSignals
    ) -> None:
        self._interface = interface
        self._held = held
        self._process = process
        self._config = config
        self._pid_file = PidFile(process.pid, interface.exits.pid)
        self._remover = Remover(
            config.state.location.folder_to_make or None if config.state else None
        )

    def part(self, child: int) -> None:
        """The last that the process does which has started *child*, a background one, now ready.

        Raises:
            VtpmError: It does not answer, or the pid file cannot be written.
        """
        self._interface.confirm()
        self._pid_file.open(self._process.runas)
        self._pid_file.write_for(child)

    def live(self, ready: Callable[[], None]) -> int:
        """From acquiring to the end; returns the exit status. *ready* is called in between."""
        try:
            with contextlib.ExitStack() as stack:
                # Goes last: then interface, state and lock are a successor's to take.
                stack.callback(self.remove_files)
                stack.callback(self._interface.close)
                self._acquire()

                from vtpm_cuse.service.confine.preload import import_trio

                import_trio()
                import trio

                from vtpm_cuse.service.compose import make_vtpm

                vtpm = make_vtpm(self._config, self._chip)
                stack.callback(vtpm.close)
                self._interface.load()
                trio.run(self._serve, vtpm, ready)
                if vtpm.gone is not None:
                    raise vtpm.gone
                if vtpm.state_lost:  # PEER: ends with status 0
                    raise TpmUnavailable(PtmResult.TPM_FAIL, "The state is another process'")
        except TpmUnavailable:
            return self._interface.exits.start
        except VtpmError as exc:
            log.error("%s", faults.sentence(exc))
            return faults.exit_status(exc)
        return 0

    def remove_files(self) -> None:
        """Removes sockets and pid file, and returns when that is done; again is harmless."""
        self._remover.end(pid_files=self._pid_file.ours or self._process.background)

    def _acquire(self) -> None:
        self._manager = notify.connect()
        self._interface.awaited = self._process.background or self._manager.waits
        if self._config.chip is not None:
            from vtpm_cuse.acquire.chip import open_chip

            with opening(self._process.runas, self._config.chip.path):
                self._chip = open_chip(self._config.chip)
        self._interface.open()
        if not self._process.background:  # else `part` makes it, when all is ready
            self._pid_file.open(self._process.runas)
        with self._pid_file.discarded():
            self._acquire_as_user()

    def _acquire_as_user(self) -> None:
        if (user := self._process.runas) is not None:
            from vtpm_cuse.service.confine.preload import import_all
            from vtpm_cuse.service.confine.privileges import become
            from vtpm_cuse.service.confine.sandbox import write_only

            import_all()
            if self._process.seccomp == "kill":
                write_only()
            become(user, self._interface.exits)
        _check_threads()
        # Before anything that takes time: who polls for a socket need not wait.
        self._interface.acquire()
        sockets, to_come = self._interface.give_up_paths(), self._process.background
        self._remover.start(sockets, self._pid_file, to_come=to_come)

    async def _serve(self, vtpm: Vtpm, ready: Callable[[], None]) -> None:
        import trio

        from vtpm_cuse.service.compose import power_on
        from vtpm_cuse.service.process.signals import ending_signals

        worker = self._enter_sandbox()
        self._interface.give_up = functools.partial(self._give_up, vtpm)
        scope = trio.CancelScope()
        try:
            if power_on(vtpm, self._config):
                # Signals first: who sees the device, or finds the pid file, may send one.
                with ending_signals(scope.cancel, self._held.release), scope:
                    await self._serve_running(vtpm, worker, ready)
        finally:
            worker.close()
            vtpm.close()
            self._interface.close()

    async def _serve_running(self, vtpm: Vtpm, worker: Worker, ready: Callable[[], None]) -> None:
        import trio

        await trio.lowlevel.checkpoint_if_cancelled()  # then nothing is to appear
        vtpm.defer_to(worker.run_later)
        await self._interface.appear(vtpm)
        if not self._process.background:
            self._pid_file.write(self._remover.write_pid)
        gc.freeze()  # what start-up made stays
        gc.enable()

        def announce() -> None:
            self._manager.ready(in_background=self._process.background)
            ready()

        try:
            with trio.CancelScope() as scope:

                def end_soon() -> None:
                    scope.deadline = trio.current_time() + _GONE_SECONDS

                token = trio.lowlevel.current_trio_token()
                vtpm.on_gone = functools.partial(token.run_sync_soon, end_soon)
                await self._interface.serve(vtpm, worker, announce)
        finally:
            self._manager.stopping()

    def _give_up(self, vtpm: Vtpm) -> None:
        """The pid file goes last: then names, state and lock are a successor's to take."""
        vtpm.close()
        self._interface.withdraw()
        self.remove_files()

    def _enter_sandbox(self) -> Worker:
        from vtpm_cuse.serve.worker import Worker
        from vtpm_cuse.service.confine import sandbox, seccomp

        process, interface = self._process, self._interface
        with contextlib.ExitStack() as undo:

            def start_worker() -> Worker:
                with _starting_threads():
                    worker = Worker()
                undo.callback(worker.close)
                return worker

            try:
                rules = seccomp.make_filter(process.seccomp, sockets=interface.sockets)
                worker = sandbox.enter(process, self._config.state, rules, start_worker)
            except FrontendError as exc:
                raise UsageError(str(exc), interface.exits.sandbox) from exc
            undo.pop_all()
            return worker
