"""What ``swtpm_setup`` and ``swtpm_localca`` say at work: a log for scripts, a line for people."""

from __future__ import annotations

import errno
import os
import sys
from typing import TYPE_CHECKING, Final

from vtpm_cuse.cli.words.program import complain, inform
from vtpm_cuse.errors import UsageError, shown
from vtpm_cuse.files import open_to_write

if TYPE_CHECKING:
    from typing import TextIO

_MODE: Final = 0o640
_CLEAR_LINE: Final = "\r\x1b[K"


class SetupReport:
    """Implements `manufacture.plan.Reporter`.

    Lines go to the log file if there is one, else to standard output as the C suite's do. A
    terminal is shown one line instead, which says what is being done.

    Args:
        logfile: Path of the log file.
        quiet: Errors are all that is said; the log file is written as ever.

    Raises:
        UsageError: The log file cannot be written.
    """

    def __init__(self, logfile: str | None = None, *, quiet: bool = False) -> None:
        self._logfile = logfile
        self._fd = -1 if logfile is None else _open(logfile)
        terminal = sys.stderr.isatty()
        self._progress: TextIO | None = sys.stderr if terminal and not quiet else None
        self._plain = self._fd < 0 and not quiet and not (terminal and sys.stdout.isatty())
        self._shown = False
        self._failed = False

    def line(self, text: str) -> None:
        """Something was done."""
        if self._fd >= 0:
            self._log(text)
        elif self._plain:
            self._clear()
            inform(f"{shown(text)}\n")

    def step(self, text: str) -> None:
        """Something that may take a while begins."""
        if self._progress is not None:
            inform(f"{_CLEAR_LINE}{shown(text)} ...", self._progress)
            self._shown = True

    def error(self, text: str) -> None:
        """Something failed: people are told wherever the log is."""
        self._clear()
        complain(text)
        if self._fd >= 0:
            self._log(text)

    def done(self, text: str) -> None:
        """The last word, for people who have seen no other."""
        self._clear()
        if self._progress is not None and not self._plain:
            inform(f"{shown(text)}\n", self._progress)

    def _clear(self) -> None:
        if self._shown and self._progress is not None:
            inform(_CLEAR_LINE, self._progress)
            self._shown = False

    def _log(self, text: str) -> None:
        try:
            os.write(self._fd, f"{shown(text)}\n".encode(errors="backslashreplace"))
        except OSError as exc:  # the TPM is what counts, as in the C suite
            if not self._failed:
                self._failed = True
                complain(str(_unwritable(self._logfile, exc)))


def _open(path: str) -> int:
    try:
        return open_to_write(path, _MODE, umask=False)
    except OSError as exc:
        if exc.errno == errno.ELOOP and os.path.islink(path):
            raise UsageError("Logfile must not be a symlink.") from exc
        raise _unwritable(path, exc) from exc


def _unwritable(path: str | None, exc: OSError) -> UsageError:
    return UsageError(f"Cannot write to logfile {path}.", hint=exc.strerror or "")
