"""Hostile load on one TPM for as long as wanted: a line of JSON after each tenth.

On sockets, or on CUSE in the kernel lab:

    .venv/bin/python bench/soak.py --commands 1000000 --reconnects 10000
    ./setup lab -- .venv/bin/python bench/soak.py --cuse --commands 1000000 --reconnects 10000
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.support import sockets as s
from tests.support.soak import DeviceTarget, SocketTarget, Target, soak

DEVICE: Final = "vtpm-soak"


def main() -> None:
    """Runs it and prints a line of JSON after each tenth."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--commands", type=int, default=100_000)
    parser.add_argument("--reconnects", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cuse", action="store_true", help="on CUSE instead of sockets")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if given.cuse:
            _soak_cuse(Path(folder), given)
            return
        with s.Server(Path(folder), *s.RUNNING, "--log", "file=-") as server:
            _run(SocketTarget(server), given)
            server.process.send_signal(signal.SIGTERM)
            print(json.dumps({"status": server.wait()}))


def _run(target: Target, given: argparse.Namespace) -> None:
    for figures in soak(target, given.commands, given.reconnects, given.seed):
        print(json.dumps(figures), flush=True)


def _soak_cuse(folder: Path, given: argparse.Namespace) -> None:
    words = ["-n", DEVICE, "--tpm2", "--tpmstate", f"dir={folder}", "--flags", "startup-clear"]
    words += ["--pid", f"file={folder / 'pid'}", "--log", "file=-"]
    program = [*s.OURS, "cuse"]
    subprocess.run([*program, *words], check=True, env=s.environment())
    pid = int((folder / "pid").read_text())
    try:
        _run(DeviceTarget(f"/dev/{DEVICE}", pid), given)
    finally:
        os.kill(pid, signal.SIGTERM)
        while os.path.exists(f"/dev/{DEVICE}"):
            time.sleep(0.01)


if __name__ == "__main__":
    main()
