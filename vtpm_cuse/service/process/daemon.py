"""Going to the background, with a parent that tells the truth.

The fork comes before threads, event loop, libtpms and locks exist.

By hand: python-daemon's parent ends at once, and tells nobody how the start went.
"""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING, NoReturn

from vtpm_cuse.files import open_nowhere
from vtpm_cuse.service.process.held import ending_signals_heard

if TYPE_CHECKING:
    from collections.abc import Callable

    from vtpm_cuse.service.process.held import HeldSignals

    Serve = Callable[[Callable[[], None]], int]

_READY = b"R"


class _Ended(BaseException):
    """By a signal."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def run_in_background(
    serve: Serve, confirm: Callable[[int], None], held: HeldSignals | None = None
) -> int:
    """Runs *serve* in a session of its own, in a child.

    There, *serve* gets the function to call once the service is ready, and its exit status is
    returned. The parent waits for that call, then for *confirm*, which it tells the child's process
    id, and ends with status 0: at once, for who sees what *confirm* does shall find one process.
    When the child ends before, the parent returns the child's status. Until then the child's errors
    appear on the caller's standard error. A signal ends the child, in order, then the parent, whom
    nobody shall believe to have started something.

    Signals that are *held* stay so in the child, which releases them.

    Raises:
        VtpmError: From *confirm*, in the parent; the child has been told to end.
        OSError: There is no process, or no descriptor, to be had.
    """
    read_end, write_end = os.pipe()
    try:
        child = os.fork()
    except OSError:
        os.close(read_end)
        os.close(write_end)
        raise
    if child == 0:
        os.close(read_end)
        os.setsid()
        os.chdir("/")
        null = open_nowhere()  # a sandbox allows neither once it is ready
        return serve(lambda: _detach(write_end, null))
    os.close(write_end)
    try:
        _raise_signals()
        if held is not None:
            held.release()
        if os.read(read_end, 1) == _READY:
            confirm(child)
            os._exit(0)
    except _Ended as exc:
        os.kill(child, signal.SIGTERM)
        os.waitpid(child, 0)
        _die_by(exc.number)
    except BaseException:
        os.kill(child, signal.SIGTERM)
        os.waitpid(child, 0)  # a device that it made is gone then
        raise
    finally:
        os.close(read_end)
    return _status_of(child)


def _raise_signals() -> None:
    heard = ending_signals_heard()

    def on_signal(number: int, _frame: object) -> NoReturn:
        for other in heard:  # once is enough
            signal.signal(other, signal.SIG_IGN)
        raise _Ended(number)

    for number in heard:
        signal.signal(number, on_signal)


def _detach(write_end: int, null: int) -> None:
    """Lets go of the caller's terminal, then of the caller."""
    for fd in range(3):
        os.dup2(null, fd)
    os.close(null)
    os.write(write_end, _READY)
    os.close(write_end)


def _status_of(child: int) -> int:
    """The child's exit status, or this process' death by the child's signal."""
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status < 0:
        _die_by(-status)
    return status


def _die_by(number: int) -> None:
    with contextlib.suppress(OSError):  # SIGKILL never had a handler
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
