"""Where the sockets of private TPMs are, in tests that look whether anything is left."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def runtime_folder() -> Iterator[Path]:
    """For XDG_RUNTIME_DIR: short, and a shell would see two words. In the end nothing is in it."""
    folder = Path(tempfile.mkdtemp(prefix="run time-"))
    yield folder
    wait_until(lambda: not os.listdir(folder), "sockets and folders are removed")
    wait_until(lambda: not processes_below(folder), "who removed them has ended")
    folder.rmdir()


def processes_below(folder: Path) -> list[str]:
    """Command lines that name *folder*."""
    return [*lines_with(str(folder)).values()]


def lines_with(text: str) -> dict[int, str]:
    """The command lines in which that is, by their processes."""
    found = {}
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            line = place.read_bytes().rstrip(b"\0").replace(b"\0", b" ")
            if os.fsencode(text) in line:
                found[int(place.parent.name)] = os.fsdecode(line)
    return found


def children(pid: int) -> dict[int, str]:
    """Processes with their command lines."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return {int(pid): Path(f"/proc/{pid}/cmdline").read_text() for pid in found}
