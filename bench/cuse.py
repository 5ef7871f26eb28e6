"""Speed and memory of the CUSE device: run in the kernel lab.

./setup lab -- .venv/bin/python bench/cuse.py

Round trips are made by a small C client (device_client.c), once with client and
server on one CPU and once free. The C suite's CUSE server is not in Debian; its
figure in this kind of lab is 224 to 252 microseconds on one CPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from bench.device import PROGRAMS, measure
from bench.report import Report, add_arguments, finish

IN_LAB: Final = True
DEVICE: Final = Path("/dev/vtpmbench")


def measured() -> Report:
    """Starts a server and measures it."""
    report = Report("cuse", "CUSE device, in the kernel lab")
    flags = ("--flags", "not-need-init,startup-clear")
    measure(report, DEVICE, [str(PROGRAMS / "swtpm-cuse"), "-n", DEVICE.name, "--tpm2", *flags], {})
    return report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    options = parser.parse_args()
    finish(measured(), options)
