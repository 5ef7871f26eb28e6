"""A process that writes a TPM's commands down, readable, while they come."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Final

from vtpm_cuse.client.child import program_environment, program_words
from vtpm_cuse.errors import UsageError

_STANDARD_ERROR: Final = "-"
_MODE: Final = 0o600


class Tracer:
    """``vtpm trace`` behind a pipe.

    Args:
        path: The file it writes, from its beginning; "-" for standard error.

    Attributes:
        fd: Takes a packet capture of format pcapng.

    Raises:
        UsageError: The file cannot be written.
        OSError: It cannot be started.
    """

    def __init__(self, path: str) -> None:
        read_end, self.fd = os.pipe()
        file = -1
        try:
            file = _opened(path)
            self._process = subprocess.Popen(  # noqa: S603 - our own program
                [*program_words("vtpm_cuse.cli.vtpm.vtpm"), "trace", "-"],
                stdin=read_end,
                stdout=file,
                stderr=sys.stderr.fileno(),
                cwd="/",
                env=program_environment(),
                start_new_session=True,  # as the TPM: what is typed to interrupt is not for it
            )
        except BaseException:
            os.close(self.fd)
            raise
        finally:
            os.close(read_end)
            if file >= 0:
                os.close(file)

    def end(self) -> bool:
        """Waits until all is written, once nobody else has `fd`; whether it was."""
        os.close(self.fd)
        return self._process.wait() == 0

    def abandon(self) -> None:
        """There was no TPM."""
        self._process.kill()
        self.end()


def _opened(path: str) -> int:
    if path == _STANDARD_ERROR:
        return os.dup(sys.stderr.fileno())
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, _MODE)
    except OSError as exc:
        raise UsageError(f"Could not write {path}: {exc.strerror}") from exc
