"""One set-up from its beginning to its end."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from typing import TYPE_CHECKING, Final

from vtpm_cuse.errors import UsageError
from vtpm_cuse.files import write_output
from vtpm_cuse.manufacture.certify import make_certifier
from vtpm_cuse.manufacture.config import Existing
from vtpm_cuse.manufacture.confined import ConfinedTpm
from vtpm_cuse.manufacture.tpm2 import Tpm2Setup
from vtpm_cuse.manufacture.tpm12 import Tpm12Setup
from vtpm_cuse.manufacture.tpms import ChildTpm, EngineTpm

if TYPE_CHECKING:
    from collections.abc import Callable

    from vtpm_cuse.manufacture.config import SetupConfig
    from vtpm_cuse.manufacture.plan import Certifier, Reporter, SetupTpm
    from vtpm_cuse.manufacture.target import Target

_FILE_MODE: Final = 0o640
_JOIN_SECONDS: Final = 0.1
_ENDING: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def set_up(config: SetupConfig, target: Target, report: Reporter) -> None:
    """Makes a TPM, or changes the one that is there, and writes it to *target* at the end.

    Raises:
        VtpmError: It could not be done; what is stored is as it was.
        KeyboardInterrupt: So did the user end it.
    """
    reconfigure = config.existing is Existing.RECONFIGURE
    before = target.blobs() if reconfigure else {}
    with contextlib.ExitStack() as closing:
        certifier: Certifier | None = None
        if config.plan.needs_certificates:
            certifier = make_certifier(config, report)
            closing.callback(certifier.close)
        # Made here: keys and profiles are looked at before anything is done.
        tpm = _make_tpm(config, before)
        closing.callback(tpm.close)
        kind = Tpm2Setup if config.plan.tpm2 else Tpm12Setup
        setup = kind(tpm, config.plan, certifier, report)

        def work() -> None:
            if certifier is not None:
                certifier.begin()
            tpm.start()
            setup.run()

        _interruptible(work, tpm, certifier)
        made = tpm.finish()
        # From here on it is too late to end this: what little is left is done.
        signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
        if reconfigure:
            target.update(before, made)
        else:
            target.replace(made)
    if config.certificate_directory is not None:
        write_copies(config.certificate_directory, setup.certificates)


def _make_tpm(config: SetupConfig, before: dict[str, bytes]) -> SetupTpm:
    if config.command:
        return ChildTpm(config, before)
    return ConfinedTpm(config, before) if before else EngineTpm(config, before)


def _interruptible(work: Callable[[], None], tpm: SetupTpm, certifier: Certifier | None) -> None:
    """Calls *work* in a thread: a signal is seen at once here, and ends what libtpms is at.

    What the signal is to raise is raised when the thread has ended: whoever clears up must not
    take the TPM away below a running command. (A join that an exception ends takes the thread for
    ended from then on.)
    """
    failed: list[BaseException] = []
    came: list[signal.Signals] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as exc:
            failed.append(exc)

    def end(number: int, _frame: object) -> None:
        came.append(signal.Signals(number))
        tpm.cancel()
        if certifier is not None:
            certifier.cancel()

    found = {number: signal.getsignal(number) for number in _ENDING}
    handlers = {number: handler for number, handler in found.items() if callable(handler)}
    for number in handlers:
        signal.signal(number, end)
    thread = threading.Thread(target=guarded)
    try:
        thread.start()
    except RuntimeError as exc:
        failed.append(UsageError(f"{exc}; the limit of processes may be too low (ulimit -u)"))
    while thread.is_alive():  # a signal just before a join waits for the end of that
        thread.join(_JOIN_SECONDS)
    if came:
        signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)  # once is enough
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if came:
        handlers[came[0]](came[0], None)
    if failed:
        raise failed[0]


def write_copies(directory: str, files: dict[str, bytes]) -> None:
    """Copies for whoever wants to verify the TPM. Raises UsageError; the TPM is there already."""
    for name, data in files.items():
        path = os.path.join(directory, name)
        try:
            write_output(path, data, _FILE_MODE)
        except OSError as exc:
            raise UsageError(f"Error writing to {path}: {exc.strerror}") from exc
