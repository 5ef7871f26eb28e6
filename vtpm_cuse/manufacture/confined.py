"""A TPM that is there already, in a process of its own, in the sandbox.

Somebody may have prepared its state. Whoever takes over libtpms by that finds himself where there is
nothing but this TPM: no path, no descriptor of ours, no lock. What he gives back as its state is
what he could have written there before.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
from typing import TYPE_CHECKING, Final

from vtpm_cuse.acquire.keeper import settle_down
from vtpm_cuse.client.connect import receive
from vtpm_cuse.config import ProcessConfig
from vtpm_cuse.errors import FrontendError, UsageError, VtpmError
from vtpm_cuse.manufacture.tpms import ANSWER_SECONDS, EngineTpm
from vtpm_cuse.service.confine import sandbox, seccomp
from vtpm_cuse.service.process import logs
from vtpm_cuse.storage.base import BLOB_NAMES, PERMANENT
from vtpm_cuse.wire.tpm import TpmRc

if TYPE_CHECKING:
    from vtpm_cuse.manufacture.config import SetupConfig

_START: Final = b"S"
_PROCESS: Final = b"P"
_INFO: Final = b"I"
_STOP: Final = b"F"
_BLOB: Final = b"B"
_DONE: Final = b"+"
_FAILED: Final = b"-"
_LENGTH: Final = 4
_MESSAGE_MAX: Final = 1 << 21
"""Bytes: more than any state has."""
_PROCESS_HINTS: Final = {errno.EAGAIN: "see 'ulimit -u'", errno.EMFILE: "see 'ulimit -n'"}
_HINT: Final = "--tpm 'swtpm socket --seccomp action=none' does without"


class ConfinedTpm:
    """An `EngineTpm` that is there; made while this process has but one thread.

    Raises:
        VtpmError: As for `EngineTpm`; or there is no sandbox to be had.
    """

    def __init__(self, config: SetupConfig, blobs: dict[str, bytes]) -> None:
        self._tpm = EngineTpm(config, blobs)  # reads the key; libtpms sees nothing yet
        self._before = blobs
        self.tpm2 = self._tpm.tpm2
        self._canceled = False
        try:
            rules = seccomp.make_filter("kill", sockets=False)
        except FrontendError as exc:
            raise UsageError(exc.reason, hint=_HINT) from exc
        ends: tuple[socket.socket, ...] = ()
        try:
            self._end, end = ends = socket.socketpair()
            self._child = os.fork()
        except OSError as exc:
            for one in ends:
                one.close()
            self._tpm.close()
            reason = f"No process can be started: {exc.strerror}"
            raise UsageError(reason, hint=_PROCESS_HINTS.get(exc.errno or 0, "")) from exc
        if self._child == 0:
            try:
                settle_down("swtpm_setup: a TPM", {end.fileno(), *logs.descriptors()})
                _serve(self._tpm, end, rules)
            finally:
                os._exit(1)
        end.close()
        self._end.settimeout(ANSWER_SECONDS)

    def start(self) -> None:
        """Powers the TPM on. Raises UsageError; the reason is in the log."""
        self._ask(_START)

    def process(self, command: bytes) -> bytes:
        """One command, one response. Raises UsageError; KeyboardInterrupt after `cancel`."""
        return self._ask(_PROCESS, command)

    def info(self, flags: int) -> str:
        """JSON text. Raises UsageError."""
        return self._ask(_INFO, b"%d" % flags).decode(errors="replace")

    def cancel(self) -> int:
        """See `SetupTpm`."""
        self._canceled = True
        with contextlib.suppress(OSError):
            self._end.shutdown(socket.SHUT_RDWR)
        return TpmRc.TPM_SUCCESS

    def finish(self) -> dict[str, bytes]:
        """See `SetupTpm`. Raises VtpmError also where what comes back is not a TPM's state."""
        self._ask(_STOP)
        found = {name: self._ask(_BLOB, name.encode()) for name in BLOB_NAMES}
        found = {name: blob for name, blob in found.items() if blob}
        if PERMANENT not in found:
            raise UsageError("The TPM does not give its state back.")
        changed = {name for name, blob in found.items() if blob != self._before.get(name)}
        self._tpm.take(found, changed)
        return found

    def close(self) -> None:
        """See `SetupTpm`."""
        self._end.close()
        self._kill()
        self._tpm.close()

    # -- helpers --------------------------------------------------------------------------

    def _ask(self, order: bytes, data: bytes = b"") -> bytes:
        try:
            _send(self._end, order + data)
            answer = _receive(self._end)
        except (EOFError, OSError) as exc:
            if self._canceled:
                raise KeyboardInterrupt from exc
            reason = "timed out" if isinstance(exc, TimeoutError) else self._kill()
            raise UsageError(f"The TPM has ended unexpectedly: {reason}") from exc
        if not answer.startswith(_DONE):
            text = answer[1:].decode(errors="replace")
            raise UsageError("".join(char if char.isprintable() else "?" for char in text))
        return answer[1:]

    def _kill(self) -> str:
        """Ends the process; returns of what it died, which may have been before."""
        if not self._child:
            return ""
        os.kill(self._child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(self._child, 0)[1])
        self._child = 0
        return (signal.strsignal(-status) or "") if status < 0 else f"status {status}"


def _serve(tpm: EngineTpm, end: socket.socket, rules: seccomp.Filter | None) -> None:
    """In the new process: obeys, until nobody is there any more."""
    while True:
        message = _receive(end)
        order, data = message[:1], message[1:]
        try:
            if order == _START:
                _enter_sandbox(rules)
            answer = _DONE + _obey(tpm, order, data)
        except VtpmError as exc:
            answer = _FAILED + str(exc).encode(errors="replace")
        _send(end, answer)


def _enter_sandbox(rules: seccomp.Filter | None) -> None:
    try:
        sandbox.enter(ProcessConfig(), None, rules, sandbox.no_thread)
    except FrontendError as exc:
        raise UsageError(exc.reason, hint=_HINT) from exc


def _obey(tpm: EngineTpm, order: bytes, data: bytes) -> bytes:
    if order == _START:
        tpm.start()
    elif order == _PROCESS:
        return tpm.process(data)
    elif order == _INFO:
        return tpm.info(int(data)).encode()
    elif order == _STOP:
        tpm.finish()
    elif order == _BLOB:
        return tpm.blobs.get(data.decode(), b"")
    return b""


def _send(end: socket.socket, message: bytes) -> None:
    end.sendall(len(message).to_bytes(_LENGTH, "big") + message)


def _receive(end: socket.socket) -> bytes:
    size = int.from_bytes(receive(end, _LENGTH), "big")
    if size > _MESSAGE_MAX:
        raise ConnectionAbortedError("this is no answer")
    return receive(end, size)
