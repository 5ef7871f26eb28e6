"""Speed and memory of the TPM's file in a FUSE mount.

Round trips are made by a small C client (device_client.c), once with client and
server on one CPU and once free. The C suite has no such interface; a prototype
with pyfuse3 took 58 microseconds on one CPU.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from bench.device import PROGRAMS, measure
from bench.report import Report, add_arguments, finish


def measured() -> Report:
    """Starts a server and measures it."""
    report = Report("fuse", "File in a FUSE mount")
    limits = {"GetRandom, one CPU, p50": 58.0}
    with tempfile.TemporaryDirectory() as name:
        mount = Path(name) / "mount"
        words = [str(PROGRAMS / "swtpm"), "fuse", "-n", "vtpm0", "--mount", str(mount)]
        measure(report, mount / "vtpm0", words, limits)
    return report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    options = parser.parse_args()
    finish(measured(), options)
