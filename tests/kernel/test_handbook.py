"""The handbook's commands that take a kernel with devices, typed word by word."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from tests.kernel.harness import PATIENCE, ROOT, needs
from tests.support.handbook import pages, script

PLACE: Final = Path("/var/lib/vtpm-cuse")
# The tests are root, and the modules are there or in the kernel.
SHIMS: Final = 'sudo() { "$@"; }; modprobe() { grep -q "" /proc/modules; }\n'


@pytest.mark.parametrize("page", pages(lab=True), ids=lambda page: page.stem)
def test_a_page_word_by_word(cuse: None, page: Path) -> None:
    needs(not PLACE.exists(), f"{PLACE} is there already")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    try:
        subprocess.run(
            ["bash", "-eux", "-c", SHIMS + script(page, lab=True)],
            check=True,
            cwd=ROOT,
            env={**os.environ, "PATH": path},
            timeout=PATIENCE,
        )
    finally:
        shutil.rmtree(PLACE, ignore_errors=True)
