"""Least privilege: what a process may still do once it has acquired what it serves.

No right but those of its user, no new ones, no core dump, no path but the state, no program, no
connection, no other process.
"""

from __future__ import annotations

import ctypes
import logging
import os
from typing import TYPE_CHECKING, Final

from vtpm_cuse.errors import FrontendError
from vtpm_cuse.service import capabilities, landlock, secrecy

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from vtpm_cuse.service.config import ProcessConfig, StateConfig

log = logging.getLogger(__name__)

_PR_SET_NO_NEW_PRIVS: Final = 38
_FILE: Final = landlock.READ_FILE | landlock.WRITE_FILE | landlock.TRUNCATE
_DIRECTORY: Final = _FILE | landlock.READ_DIR | landlock.MAKE_REG | landlock.REMOVE_FILE


def allowed_paths(state: StateConfig | None, removed: Iterable[str]) -> dict[str, int]:
    """What a vTPM needs, with Landlock's rights: its state, and the files it removes at its end."""
    paths: dict[str, int] = {}
    for path in removed:
        paths[os.path.dirname(path)] = landlock.REMOVE_FILE
    scheme, _, path = state.uri.partition("://") if state else ("", "", "")
    if scheme == "dir":
        paths[path] = _DIRECTORY
    elif scheme == "file":
        folder = os.path.dirname(path)
        paths[folder] = paths.get(folder, 0) | landlock.READ_DIR  # to flush it
        if os.path.exists(path):
            paths[path] = _FILE
        else:
            paths[folder] |= _FILE | landlock.MAKE_REG
    return paths


def restrict(process: ProcessConfig, paths: Mapping[str, int]) -> None:
    """Restricts this thread and those it starts; before any is started.

    Raises:
        FrontendError: The kernel refuses.
    """
    try:
        secrecy.hide_process()
        capabilities.drop_capabilities(paths)
        if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "no_new_privs")
        if process.seccomp != "kill":  # what is to be found out, or tried, must not be refused
            return
        if landlock.version():
            landlock.restrict(paths)
        else:
            log.debug("This kernel has no Landlock: paths stay as open as they are to the user")
    except OSError as exc:
        reason = f"Could not drop privileges: {exc.strerror}"
        raise FrontendError(reason, "--seccomp action=none restricts less") from exc
