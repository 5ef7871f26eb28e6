"""What a manager, and every program that it starts, may still do once it has an opener.

It survives an execve, so the program that takes the manager's place is in it, too, as workers and
set-ups are, which go on into narrower ones of their own. It is therefore no list of all that a
manager needs: any file can be read and any program run, for a key, a new version or what a new
version imports may be anywhere. But only its own folders are written to, and what no such
program does is refused.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from typing import TYPE_CHECKING, Final

from vtpm_cuse.errors import FrontendError, UsageError
from vtpm_cuse.files import make_folder
from vtpm_cuse.fleet.manager.manager import RUN_MODE
from vtpm_cuse.fleet.states.catalogue import FOLDER_MODE
from vtpm_cuse.manufacture.files import written_folders
from vtpm_cuse.service.confine import capabilities, landlock, seccomp
from vtpm_cuse.service.process import logs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vtpm_cuse.fleet.manager.manager import Settings

log = logging.getLogger(__name__)

_CDI_MODE: Final = 0o755
_READ: Final = landlock.READ_FILE | landlock.READ_DIR | landlock.EXECUTE
_WRITE: Final = landlock.WRITE_FILE | landlock.TRUNCATE
_KEEP: Final = (
    _WRITE
    | (landlock.MAKE_DIR | landlock.MAKE_REG | landlock.MAKE_SOCK)
    | (landlock.REMOVE_DIR | landlock.REMOVE_FILE | landlock.REFER)
)
_NEEDED: Final = (
    *(capabilities.CAP_CHOWN, capabilities.CAP_DAC_OVERRIDE, capabilities.CAP_FOWNER),
    *(capabilities.CAP_KILL, capabilities.CAP_SETGID, capabilities.CAP_SETUID),
)
"""Of root's: vtpmd.service says what for."""


def enter(settings: Settings) -> None:
    """For good; while this process has but one thread.

    Raises:
        FrontendError: A folder cannot be made, or the kernel refuses.
    """
    try:
        make_folder(settings.state, FOLDER_MODE)
        make_folder(settings.run, RUN_MODE, umask=False)
    except OSError as exc:
        reason = f"There are no folders {settings.state} and {settings.run}: {exc.strerror}"
        raise FrontendError(reason, "choose others with --state and --run") from exc
    try:
        written = _written(settings)
        capabilities.bound(*_NEEDED)
        capabilities.gain_nothing()
        if written is None:
            log.warning("Any file can be written to, for a foreign program makes certificates")
        elif landlock.version() < landlock.REFERS_SINCE:
            raise landlock.LandlockMissing("this kernel's is too old")
        else:
            allowed = {"/": _READ, "/dev": _WRITE | landlock.IOCTL_DEV}
            landlock.restrict(allowed | dict.fromkeys(written, _KEEP), files_only=True)
    except landlock.LandlockMissing as exc:
        log.warning("There is no Landlock, so any file can be written to: %s", exc)
    except OSError as exc:
        raise FrontendError(f"Could not drop privileges: {exc.strerror}") from exc
    seccomp.make_common_filter().load()


def _written(settings: Settings) -> list[str] | None:
    """The folders that are written to; None where any may be."""
    try:
        found = written_folders()
    except UsageError as exc:  # who wants a TPM that is manufactured hears of it
        log.info("No TPM can be manufactured: %s", exc)
        found = ()
    if found is None:
        return None
    return [*found, *_own(settings)]


def _own(settings: Settings) -> Iterator[str]:
    yield from (settings.state, settings.run)
    with contextlib.suppress(FileNotFoundError):
        yield tempfile.gettempdir()
    if settings.metrics_file is not None:
        yield os.path.dirname(os.path.abspath(settings.metrics_file))
    if settings.cdi is not None:
        with contextlib.suppress(OSError):  # who offers a TPM hears of it
            make_folder(settings.cdi, _CDI_MODE, umask=False)
        yield settings.cdi
    for fd in logs.descriptors():  # the next program opens it anew
        path = os.readlink(f"/proc/self/fd/{fd}")
        if os.path.isfile(path):
            yield os.path.dirname(path)
