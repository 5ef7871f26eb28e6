"""The managed device beside the kernel's own resource manager: run in the kernel lab.

./setup lab -- .venv/bin/python bench/managed_device.py

Many clients use three keys each, one command a time, where the TPM has room for three keys in all: on
the managed device of ``swtpm-cuse``, and on /dev/tpmrmN, where the kernel manages a TPM of ours too.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from bench.device import PROGRAMS
from bench.managed import CLIENTS, KEYS, round_robin
from bench.proxy import Server
from bench.report import Report, add_arguments, finish

if TYPE_CHECKING:
    from collections.abc import Iterator

IN_LAB: Final = True
NAME: Final = "vtpmbench"
COMMANDS: Final = 480
"""A tenth of what is sent natively: the lab is that much slower."""


class Device:
    """An open of one."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR)

    def exchange(self, command: bytes) -> bytes:
        """One command, one response."""
        os.write(self._fd, command)
        return os.read(self._fd, 4096)

    def close(self) -> None:
        """Ends it."""
        os.close(self._fd)


@contextmanager
def _managed(folder: Path) -> Iterator[Path]:
    folder.mkdir()
    words = [str(PROGRAMS / "swtpm-cuse"), "-n", NAME, "--tpm2", "--tpmstate", f"dir={folder}"]
    words += ["--flags", "startup-clear", f"--resource-manager={NAME}rm"]
    subprocess.run([*words, "--pid", f"file={folder}/pid"], check=True)
    path = Path("/dev") / f"{NAME}rm"
    while not path.exists():
        time.sleep(0.01)
    try:
        yield path
    finally:
        subprocess.run([str(PROGRAMS / "swtpm_ioctl"), "-s", f"/dev/{NAME}"], check=False)


def measured() -> Report:
    """Starts both and measures them."""
    if not os.path.exists("/dev/cuse"):
        sys.exit("bench: there is no /dev/cuse; run it in the kernel lab")
    report = Report("managed_device", "The managed device beside the kernel's, in the kernel lab")
    report.notes.append("Peer: the kernel's /dev/tpmrmN above a TPM of ours.")
    with tempfile.TemporaryDirectory() as name, _managed(Path(name) / "ours") as ours:
        kernel = Server(str(PROGRAMS / "swtpm"), Path(name) / "kernel")
        try:
            for count in CLIENTS:
                times = [
                    round_robin(lambda: Device(path), count, commands=COMMANDS)[0]  # noqa: B023
                    for path in (ours, kernel.shared)
                ]
                what = f"ReadPublic, {count} clients with {KEYS} keys each, p50"
                report.add(what, "µs", times[0], times[1], limit=0.5)
        finally:
            kernel.close()
    return report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    options = parser.parse_args()
    finish(measured(), options)
