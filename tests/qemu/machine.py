"""QEMU with an emulated TPM, driven over QMP, and the TPM emulator beside it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tests.qemu.guest import Shell

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

QEMU: Final = shutil.which("qemu-system-x86_64")
PEER: Final = shutil.which("swtpm", path="/usr/bin")
OURS: Final = (sys.executable, "-c", "from vtpm_cuse.cli.swtpm import main; main()")
TREE: Final = Path(__file__).parents[2]
PATIENCE_SECONDS: Final = 30.0
BOOT_SECONDS: Final = 120.0


class MachineError(Exception):
    """QEMU or an emulator ended, refused a request, or does not answer."""


def wait_until(condition: Callable[[], bool], what: str, seconds: float = PATIENCE_SECONDS) -> None:
    """Looks for something that announces itself in no other way."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise MachineError(f"{what}: not in {seconds} s")
        time.sleep(0.005)
