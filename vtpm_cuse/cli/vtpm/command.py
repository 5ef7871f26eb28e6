"""A command of the user's, run for him as his shell would: same terminal, same signals, its status.

It stays in our process group, so what is typed to interrupt or stop it reaches it without us.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
from typing import TYPE_CHECKING, Final, Self

from vtpm_cuse.errors import UsageError
from vtpm_cuse.programs import start_program

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Sequence
    from types import FrameType

FAILED: Final = 125  # as env(1) and timeout(1) have it
NOT_EXECUTABLE: Final = 126
NOT_FOUND: Final = 127
_KILLED: Final = 128
_WAKES_MAX: Final = 4096
_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h

_TYPED: Final = (signal.SIGINT, signal.SIGQUIT)
"""A terminal gives them to the whole group: the command has them already, and decides."""
_PASSED_ON: Final = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_TAKEN: Final = (*_TYPED, *_PASSED_ON)


class EndedBySignal(BaseException):
    """A signal came before the command was started.

    Attributes:
        number: Which.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def find_command(name: str) -> str:
    """Where it is. Raises UsageError, with the exit status of a shell, unless it is there."""
    if "/" in name:
        places = [name]
    else:
        places = [os.path.join(folder or os.curdir, name) for folder in os.get_exec_path()]
    for place in places:
        if os.path.isfile(place) and os.access(place, os.X_OK):
            return place
    if "/" in name and os.path.isdir(name):
        raise UsageError(f"{name} is a directory and no command", NOT_EXECUTABLE)
    if name and any(map(os.path.isfile, places)):
        raise UsageError(f"{name} may not be executed; see its mode", NOT_EXECUTABLE)
    raise UsageError(f"There is no command '{name}'", NOT_FOUND)


def _start(
    words: Sequence[str], env: dict[str, str], mask: set[int | signal.Signals]
) -> subprocess.Popen[bytes]:
    """Raises as `Attendant.run`."""
    name = words[0]
    try:
        return start_program(
            words,
            executable=find_command(name),
            env=env,
            # As the caller gave them: others that are open, too, but for ours, which close.
            close_fds=False,
            preexec_fn=bound_to(os.getpid(), mask),
        )
    except FileNotFoundError as exc:
        raise UsageError(f"What runs {name} is not there; see its first line", NOT_FOUND) from exc
    except PermissionError as exc:
        raise UsageError(f"{name} may not be executed; see its mode", NOT_EXECUTABLE) from exc


def bound_to(parent: int, mask: set[int | signal.Signals]) -> Callable[[], None]:
    """What a child of *parent* calls, to be killed by the kernel when that thread has ended.

    Between fork and exec, which is no place for Python code where there are threads. The signals
    that we take are blocked in both until then, and reach the child when it has *mask* again.
    """
    libc = ctypes.CDLL(None)

    def bind() -> None:
        failed = libc.prctl(_PR_SET_PDEATHSIG, *map(ctypes.c_ulong, (signal.SIGKILL, 0, 0, 0)))
        if failed or os.getppid() != parent:  # it was killed before the kernel knew
            os._exit(FAILED)
        for number in _TAKEN:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)  # a handler of ours would lose it
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    return bind


class Attendant:
    """Signals to this process, from the entry of the context: until `run`, they are exceptions.

    What is ignored when a program begins, as under nohup, stays so, for us and for the command.

    Raises:
        EndedBySignal: Anywhere in the context, but not from `run` on.
    """

    def __init__(self) -> None:
        self._early = True
        self._pending: list[int] = []
        self._command = -1  # a pidfd: the number of a process may be another's by now

    def __enter__(self) -> Self:
        for number in _TAKEN:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        """The signals stay taken: what clears up is not to be cut short."""

    def _take(self, number: int, _frame: FrameType | None) -> None:
        if self._early:
            self._early = False  # a second one does not disturb the clearing up
            raise EndedBySignal(number)
        if number in _PASSED_ON:
            self._pending.append(number)
            self._pass_on()

    def _pass_on(self) -> None:
        while self._command >= 0 and self._pending:
            try:
                signal.pidfd_send_signal(self._command, self._pending.pop())
            except ProcessLookupError:
                return

    def run(self, words: Sequence[str], env: dict[str, str]) -> int:
        """Runs it to its end; returns its exit status, or that of a shell for its signal.

        Args:
            words: It.
            env: Its environment.

        Raises:
            UsageError: It cannot be executed.
            OSError: No process is to be had.
        """
        self._early = False
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _TAKEN)
        try:
            process = _start(words, env, mask)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self._command = os.pidfd_open(process.pid)
        self._pass_on()
        self._wait_for_the_end()
        status = process.wait()
        return status if status >= 0 else _KILLED - status

    def _wait_for_the_end(self) -> None:
        """Not by waitpid: a signal just before that would be seen when the command has ended."""
        woken, wake = os.pipe()
        for fd in (woken, wake):
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        poll = select.poll()
        for fd in (self._command, woken):
            poll.register(fd, select.POLLIN)
        while self._command not in {fd for fd, _ in poll.poll()}:
            os.read(woken, _WAKES_MAX)
        signal.set_wakeup_fd(-1)
        command, self._command = self._command, -1  # from here on, nobody would get a signal
        for fd in (command, woken, wake):
            os.close(fd)
