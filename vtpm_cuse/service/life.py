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
import threading
from typing import TYPE_CHECKING, Final

from vtpm_cuse.errors import FrontendError, PtmError, UsageError, VtpmError
from vtpm_cuse.files import check_private, make_folder
from vtpm_cuse.service import notify
from vtpm_cuse.service.config import Exits
from vtpm_cuse.service.daemon import run_in_background
from vtpm_cuse.service.pidfile import PidFile
from vtpm_cuse.wire.ptm import PtmResult

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vtpm_cuse.device.vtpm import Vtpm
    from vtpm_cuse.device.worker import Worker
    from vtpm_cuse.service.config import ProcessConfig, User, VtpmConfig

log = logging.getLogger(__name__)

_LIMIT_HINT: Final = "raise the limit: 'ulimit -u', or TasksMax= of a unit"


class Interface:
    """One way to serve a vTPM; the methods are called once each, in the order they have here."""

    exits = Exits()

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
        """Imports all that the later steps take: nothing can be imported in the sandbox."""

    async def appear(self) -> None:
        """Shows the device, if that takes a TPM which is there and on.

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

    def close(self) -> None:
        """Gives up everything; may be called at any time, and again.

        In the end it is called within the sandbox: it can close, remove `paths_to_remove`, and
        start nothing.
        """

    def paths_to_remove(self) -> list[str]:
        """The files that `close` removes."""
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
    scheme, _, path = config.state.uri.partition("://") if config.state else ("", "", "")
    if config.state is None or scheme != "dir":
        return
    try:
        if config.state.own_place:
            mode = 0o700
        make_folder(path, mode, (owner.uid, owner.gid) if owner else None)
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
    where = config.state.uri.removeprefix("dir://") if config.state else "nowhere"
    version = "2.0" if config.tpm2 else "1.2"
    log.info("%s is a TPM %s, whose state is in %s.", device, version, where)


def run(interface: Interface, process: ProcessConfig, vtpm: VtpmConfig) -> int:
    """Serves a vTPM until it is told to end; returns the exit status.

    In the background case the calling process returns when clients are served.

    Raises:
        VtpmError: What was wrong.
    """
    life = _Life(interface, process, vtpm)
    try:
        if process.background:
            return run_in_background(life.live, life.part)
        return life.live(lambda: None)
    except BlockingIOError as exc:  # of fork()
        raise UsageError("Error: No other process can be started", hint=_LIMIT_HINT) from exc


def _check_threads() -> None:
    """One is needed later on, when a client may be there already. Raises UsageError."""
    thread = threading.Thread(target=int)
    try:
        thread.start()
    except RuntimeError as exc:
        raise UsageError("Error: No thread can be started", hint=_LIMIT_HINT) from exc
    thread.join()


class _Life:
    def __init__(self, interface: Interface, process: ProcessConfig, config: VtpmConfig) -> None:
        self._interface = interface
        self._process = process
        self._config = config
        self._pid_file = PidFile(process.pid, interface.exits.pid)

    def part(self, child: int) -> None:
        """Ends the process that has started *child* in the background, which is ready.

        Who finds the pid file shall find one process.
        """
        self._interface.confirm()
        self._pid_file.open(self._owner)
        self._pid_file.write(child)
        os._exit(0)

    @property
    def _owner(self) -> tuple[int, int] | None:
        user = self._process.runas
        return None if user is None else (user.uid, user.gid)

    def live(self, ready: Callable[[], None]) -> int:
        """From acquiring to the end; returns the exit status. *ready* is called in between."""
        gc.disable()  # until the service runs: start-up makes no garbage, 8 of 90 ms
        try:
            with contextlib.ExitStack() as stack:
                stack.callback(self._interface.close)
                self._acquire()

                import trio

                from vtpm_cuse.service.compose import make_vtpm, power_on

                vtpm = make_vtpm(self._config)
                stack.callback(vtpm.close)
                self._interface.load()
                if power_on(vtpm, self._config):
                    trio.run(self._serve, vtpm, ready)
                if vtpm.state_lost:  # PEER: ends with status 0
                    raise PtmError(PtmResult.TPM_FAIL, "The state is another process'")
        except PtmError:  # said by the vTPM itself
            return self._interface.exits.start
        except VtpmError as exc:
            from vtpm_cuse import faults

            log.error("%s", exc)
            return faults.exit_status(exc)
        finally:
            gc.enable()
        return 0

    def _acquire(self) -> None:
        notify.connect()
        self._interface.open()
        if (user := self._process.runas) is not None:
            from vtpm_cuse.service.preload import import_all
            from vtpm_cuse.service.privileges import become

            if not self._process.background:
                self._pid_file.open(self._owner)
            import_all()
            become(user, self._interface.exits)
        _check_threads()
        # Before anything that takes time: who polls for a socket need not wait.
        self._interface.acquire()

    async def _serve(self, vtpm: Vtpm, ready: Callable[[], None]) -> None:
        import trio

        from vtpm_cuse.service.signals import ending_signals

        interface = self._interface
        await interface.appear()
        scope = trio.CancelScope()
        # Signals first: who finds the pid file may send one.
        with ending_signals(scope.cancel), self._with_pid_file():
            worker = self._enter_sandbox()
            if vtpm.store is not None:
                vtpm.store.blobs.work_beside(worker.beside)
            try:
                with scope:
                    gc.freeze()  # what start-up made stays
                    gc.enable()

                    def announce() -> None:
                        notify.ready()
                        ready()

                    await interface.serve(vtpm, worker, announce)
            finally:
                notify.stopping()
                worker.close()
                # The pid file goes last: then interface, state and lock are a successor's to take.
                vtpm.close()
                interface.close()

    @contextlib.contextmanager
    def _with_pid_file(self) -> Iterator[None]:
        """While entered, there is a pid file, which `part` writes for a background process."""
        if not self._process.background:
            if self._process.runas is None:
                self._pid_file.open(None)
            self._pid_file.write(os.getpid())
        try:
            yield
        finally:
            self._pid_file.remove()

    def _enter_sandbox(self) -> Worker:
        from vtpm_cuse.device.worker import Worker
        from vtpm_cuse.service import sandbox, seccomp

        process, interface = self._process, self._interface
        removed = [*self._pid_file.paths, *interface.paths_to_remove()]
        try:
            rules = seccomp.make_filter(process.seccomp)
            sandbox.restrict(process, sandbox.allowed_paths(self._config.state, removed))
            worker = Worker()  # restricted as this thread is, and the last that is started
            try:
                if rules is not None:
                    rules.load()
            except BaseException:
                worker.close()
                raise
        except FrontendError as exc:
            raise UsageError(str(exc), interface.exits.sandbox) from exc
        return worker
