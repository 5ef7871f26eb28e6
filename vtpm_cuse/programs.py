"""Programs that are called: where they are found, and how those of the user's are started."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

_SHELL: Final = "/bin/sh"


def find_program(name: str, path: str | None = None) -> str | None:
    """A program by its path, or by its name in PATH, of which only absolute folders count.

    PEER: looks in the current folder, too, where PATH has an empty or relative part; whoever
    wrote to that folder would choose what root runs.

    Args:
        name: Of the program, or its path.
        path: Counts instead of the PATH of this process.
    """
    folders = os.get_exec_path() if path is None else path.split(os.pathsep)
    absolute = [folder for folder in folders if os.path.isabs(folder)]
    return shutil.which(name, path=os.pathsep.join(absolute))


def own_program(name: str) -> str | None:
    """The path of a program that is installed with this one, if it is."""
    # A link to a program is not beside the others; the interpreter of a venv is, by its link.
    for beside in (os.path.realpath(sys.argv[0]), os.path.abspath(sys.executable)):
        path = os.path.join(os.path.dirname(beside), name)
        if os.access(path, os.X_OK):
            return path
    return None


# Any: the options are those of Popen.
def start_program(words: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:  # noqa: ANN401
    """Starts a program; a script that does not say by what is run by the shell, as a shell does it.

    Raises:
        OSError: It cannot be started.
    """
    try:
        return subprocess.Popen(words, **options)  # noqa: S603 - the user's own command
    except OSError as exc:
        if exc.errno != errno.ENOEXEC:
            raise
    script = options.pop("executable", words[0])
    return subprocess.Popen([_SHELL, script, *words[1:]], **options)  # noqa: S603
