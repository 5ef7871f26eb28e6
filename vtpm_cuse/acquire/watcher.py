"""A process that tells when the kernel shows a TPM device that it was asked to make.

The kernel tests a TPM before it shows it, and its events say when that is done. To hear them takes a
library whose import costs more than our whole start, and sysfs, which the sandbox hides: so a
process of its own does it, forked before, which imports while the server starts.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from typing import Final, NoReturn

from vtpm_cuse.acquire.keeper import settle_down
from vtpm_cuse.errors import FrontendError

log = logging.getLogger(__name__)

_SECONDS: Final = 10.0
"""The kernel's own test takes one or two; who waits for the start is not to wait for ever."""
_SHOWN: Final = b"S"
_MESSAGE_MAX: Final = 512


class DeviceWatcher:
    """Waits for one device. The process ends with its answer, or with ours.

    Args:
        tpm2: The version of the TPM.
    """

    def __init__(self, *, tpm2: bool) -> None:
        self._tpm2 = tpm2
        self._ours, theirs = socket.socketpair()
        try:
            if os.fork() == 0:
                _watch(theirs.detach(), tpm2=tpm2)
        except OSError:
            self._ours.close()
            raise
        finally:
            theirs.close()

    async def shown(self, number: int) -> None:
        """Returns when the kernel shows it, or does not for too long, which is logged."""
        import trio

        answer = b""
        with contextlib.suppress(BrokenPipeError):  # what it said before it ended is still there
            os.write(self._ours.fileno(), b"%d" % number)
        await trio.lowlevel.wait_readable(self._ours)
        with contextlib.suppress(ConnectionResetError):
            answer = os.read(self._ours.fileno(), _MESSAGE_MAX)
        if answer != _SHOWN:
            path = f"/dev/tpm{'rm' if self._tpm2 else ''}{number}"
            reason = answer.decode() or "nobody could look"
            log.warning("%s may not be there yet: %s", path, reason)

    def close(self) -> None:
        """Ends the other process; again is harmless."""
        self._ours.close()


def _watch(theirs: int, *, tpm2: bool) -> NoReturn:
    try:
        settle_down("vtpm-watcher: waits for a TPM device", {theirs})
        logging.disable()  # libraries would write to what was the log
        answer = _SHOWN
        try:
            _wait(theirs, tpm2=tpm2)
        except (FrontendError, ImportError, OSError) as exc:
            answer = str(exc).encode()
        os.write(theirs, answer)
    finally:
        os._exit(0)


def _wait(theirs: int, *, tpm2: bool) -> None:
    from vtpm_cuse.containers import nodes

    # Without sysfs, below another root, say, nobody can tell, nor import what would.
    events = nodes.Events(until=theirs) if nodes.CLASSES.exists() else None
    number = os.read(theirs, _MESSAGE_MAX)
    if number and events is not None:
        nodes.wait_for(events, int(number), _SECONDS, tpm2=tpm2)
