"""Speed and memory of the kernel's own TPM devices, made by its vTPM proxy: run in the kernel lab.

./setup lab -- .venv/bin/python bench/proxy.py

Round trips are made by a small C client (device_client.c) on /dev/tpmN and /dev/tpmrmN, by turns
with our server and Debian's swtpm behind them. The kernel looks for the response about every
millisecond, which hides most of a server's speed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from bench.device import COMMANDS, PROGRAMS, build_client, memory_kib, round_trips
from bench.report import Report, add_arguments, finish

IN_LAB: Final = True
PEER: Final = "/usr/bin/swtpm"
COUNT: Final = 200
TURNS: Final = 4
LIMIT: Final = 1.15
"""On par, within what the figures vary by from one boot to the next."""


class Server:
    """``swtpm chardev --vtpm-proxy``, and the devices it stands behind."""

    def __init__(self, program: str, folder: Path) -> None:
        folder.mkdir()
        words = [program, "chardev", "--vtpm-proxy", "--tpm2", "--tpmstate", f"dir={folder}"]
        started = time.perf_counter()
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        if self.process.stdout is None or not (line := self.process.stdout.readline()):
            sys.exit(f"bench: {program} made no device")
        self.plain = Path(line.split()[3])
        self.shared = self.plain.with_name(self.plain.name.replace("tpm", "tpmrm"))
        while not self.shared.exists():
            time.sleep(0.001)
        self.seconds = time.perf_counter() - started

    def close(self) -> None:
        """Ends it."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait()


def compare(report: Report, client: Path, ours: Server, peer: Server) -> None:
    """Adds the rows of round trips."""
    for kind in ("tpm", "tpmrm"):
        for command, data in COMMANDS.items():
            times: dict[Server, list[float]] = {ours: [], peer: []}
            for _ in range(TURNS):
                for server, found in times.items():
                    device = server.plain if kind == "tpm" else server.shared
                    found += round_trips(client, device, data, None, COUNT)
            p50 = {server: statistics.median(found) for server, found in times.items()}
            p99 = {server: sorted(found)[-len(found) // 100] for server, found in times.items()}
            name = f"{command}, /dev/{kind}0"
            report.add(f"{name}, p50", "µs", p50[ours], p50[peer], limit=LIMIT)
            report.add(f"{name}, p99", "µs", p99[ours], p99[peer])


def measured() -> Report:
    """Starts both servers and measures them."""
    if not shutil.which("cc"):
        sys.exit("bench: no C compiler; apt-get install gcc libc6-dev")
    if not os.path.exists(PEER):
        sys.exit("bench: nothing to compare with; apt-get install swtpm")
    report = Report("proxy", "The kernel's TPM devices, in the kernel lab")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        client = build_client(folder)
        ours = Server(str(PROGRAMS / "swtpm"), folder / "ours")
        peer = Server(PEER, folder / "peer")
        try:
            compare(report, client, ours, peer)
            report.add("start to device", "ms", ours.seconds * 1000, peer.seconds * 1000)
            memory = [memory_kib(server.process.pid) for server in (ours, peer)]
            for kind in memory[0]:
                report.add(f"memory, {kind}", "MiB", *(found[kind] / 1024 for found in memory))
        finally:
            ours.close()
            peer.close()
    return report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    options = parser.parse_args()
    finish(measured(), options)
