"""What all programs do around their work: errors become one line and an exit status."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Final

from vtpm_cuse import __version__
from vtpm_cuse.errors import VtpmError

if TYPE_CHECKING:
    from collections.abc import Callable

PEER_VERSION: Final = "0.10.2"
"""The C suite's version whose options and outputs are ours; scripts compare with it."""


def version_text(what: str, of: str = "TPM emulator") -> str:
    """The line that ``--version`` prints."""
    return f"{of} {what}version {PEER_VERSION} (vtpm-cuse {__version__})"


def run_program(work: Callable[[], int], report: Callable[[str], None]) -> int:
    """Calls *work* and returns the exit status; *report* shows the one line about an error."""
    try:
        status = work()
        sys.stdout.flush()
    except VtpmError as exc:
        report(str(exc))
        return _status_of(exc)
    except BrokenPipeError:
        # The reader has seen enough; nothing may be flushed to it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as exc:
        report(str(exc))
        return 1
    except ImportError as exc:
        report(f"A part of this program cannot be loaded: {exc}")
        return 1
    except KeyboardInterrupt as exc:
        return _status_of(exc)
    return status


def complain(text: str) -> None:
    """Shows a message as it is, where scripts know it."""
    print(text, file=sys.stderr)


def _status_of(exc: BaseException) -> int:
    from vtpm_cuse import faults  # with all codes of the wire; only an error needs it

    return faults.exit_status(exc)
