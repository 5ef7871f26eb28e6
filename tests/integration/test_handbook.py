"""The handbook's pages, typed word by word by somebody who is not root."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Final

import pytest

from tests.support.fuse import needs_fuse, ordinary_user
from tests.support.handbook import pages, script
from tests.support.waiting import wait_until

# A user's on Debian, who has nothing of root's in it.
PATH: Final = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"


def started_from(home: Path) -> dict[int, str]:
    """Processes that have *home* in their environment, with their command lines."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if f"HOME={home}\0".encode() in (place / "environ").read_bytes():
                found[int(place.name)] = (place / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
    return found


@pytest.mark.parametrize("page", pages(lab=False), ids=lambda page: page.stem)
def test_a_page_word_by_word(page: Path) -> None:
    """It works, and it ends what it has started."""
    needs_fuse()
    with ordinary_user() as user:
        commands = f"cd\n{script(page, lab=False)}"
        try:
            user.run("bash", "-eux", "-o", "pipefail", "-c", commands, env={"PATH": PATH})
            wait_until(
                lambda: not started_from(user.folder), f"the end of all that {page.stem} starts"
            )
        finally:
            for pid in started_from(user.folder):
                os.kill(pid, signal.SIGKILL)
