"""What all programs do around their work: errors become one line and an exit status."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import signal
import sys
from typing import TYPE_CHECKING

from vtpm_cuse import PEER_VERSION, __version__
from vtpm_cuse.errors import VtpmError, shown

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TextIO


def version_text(what: str, of: str = "TPM emulator") -> str:
    """The line that ``--version`` prints."""
    return f"{of} {what}version {PEER_VERSION} (vtpm-cuse {__version__})"


def run_program(
    work: Callable[[], int], report: Callable[[str], None], *, clears_up: bool = True
) -> int:
    """Calls *work* and returns the exit status; *report* shows the one line about an error.

    The programs begin with a Ctrl-C that just ends them: in an import, Python would show where it
    was, or lose it. From here on it is a KeyboardInterrupt where *work* clears up after one.
    """
    if clears_up and signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.disable()  # until a TPM is served: a start makes no garbage, to look for it takes a tenth
    _hold_standard_files()
    if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else nobody hears how a child has ended
    try:
        status = work()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough
        status = 1
    except (VtpmError, OSError, ImportError, MemoryError, SystemError, KeyboardInterrupt) as exc:
        if not isinstance(exc, KeyboardInterrupt):
            report(_sentence(exc))
        status = _status_of(exc)
    finally:
        gc.enable()
    _drop_output()
    return status


def complain(text: str) -> None:
    """Shows a message as it is, where scripts know it; who cannot be told has the exit status.

    It may quote what others have written: a terminal obeys none of that.
    """
    with contextlib.suppress(OSError):
        print(shown(text), file=sys.stderr, flush=True)


def inform(text: str, stream: TextIO | None = None) -> None:
    """Says how the work goes on; where nobody hears it any more, the work goes on all the same."""
    stream = stream or sys.stdout
    try:
        stream.write(text)  # in one piece: two threads may do this
        stream.flush()
    except OSError:
        _silence(stream)


def _sentence(exc: BaseException) -> str:
    if isinstance(exc, ImportError):
        return f"A part of this program cannot be loaded: {exc}"
    from vtpm_cuse import faults  # with all codes of the wire; only an error needs it

    return faults.sentence(exc)


def _status_of(exc: BaseException) -> int:
    from vtpm_cuse import faults

    return faults.exit_status(exc)


def _hold_standard_files() -> None:
    """Opens those of the three standard files that the caller has closed.

    Else the next file would have such a number, the TPM's state perhaps, and take the messages.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            # It gets the lowest number that is free. To read what is not there is an error.
            os.open(os.devnull, os.O_RDWR if fd else os.O_WRONLY)
    sys.stdin = sys.stdin or os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", encoding="utf-8", closefd=False)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # as on standard error


def _drop_output() -> None:
    """Nothing may be left to be flushed at the end, to a reader that is gone or a full disk."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            _silence(stream)


def _silence(stream: TextIO) -> None:
    """What is left in it, and what is still to come, goes nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
