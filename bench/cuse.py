"""Speed and memory of the CUSE device: run in the kernel lab.

./setup lab -- .venv/bin/python bench/cuse.py

Round trips are made by a small C client (device_client.c), once with client and
server on one CPU and once free. The C suite's CUSE server is not in Debian; its
figure in this kind of lab is 224 to 252 microseconds on one CPU.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from bench.report import Report, add_arguments, finish

IN_LAB: Final = True
ROOT: Final = Path(__file__).resolve().parent.parent
PROGRAMS: Final = Path(sys.executable).parent
COMMANDS: Final = {
    "GetRandom": "80010000000c0000017b0010",
    "PCR_Read": "8001000000140000017e00000001000b03010000",
    "PCR_Extend": (
        "80020000004100000182000000100000000940000009000001000000000001000b" + "11" * 32
    ),
}
COUNT: Final = 2000
DEVICE: Final = "/dev/vtpmbench"


def build_client(folder: Path) -> Path:
    """Compiles the C client."""
    client = folder / "device_client"
    source = Path(__file__).parent / "device_client.c"
    subprocess.run(["cc", "-O2", "-o", str(client), str(source)], check=True)
    return client


def start_server(folder: Path) -> tuple[int, float]:
    """Starts our server in the background; returns its pid and the seconds to its first answer."""
    state, pid_file = folder / "state", folder / "pid"
    started = time.perf_counter()
    subprocess.run(
        [
            str(PROGRAMS / "swtpm-cuse"),
            *("-n", Path(DEVICE).name, "--tpm2", "--tpmstate", f"dir={state}"),
            *("--flags", "not-need-init,startup-clear", "--pid", f"file={pid_file}"),
        ],
        check=True,
    )
    fd = os.open(DEVICE, os.O_RDWR)
    os.write(fd, bytes.fromhex(COMMANDS["GetRandom"]))
    os.read(fd, 4096)
    seconds = time.perf_counter() - started
    os.close(fd)
    return int(pid_file.read_text()), seconds


def round_trips(client: Path, command: str, cpu: str | None) -> list[float]:
    """Sorted durations in microseconds."""
    pinned = ["taskset", "-c", cpu] if cpu else []
    run = subprocess.run(
        [*pinned, str(client), DEVICE, str(COUNT), command],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return sorted(int(line) / 1000 for line in run.stdout.split())


def memory_kib(pid: int) -> dict[str, int]:
    """Resident and proportional memory."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = dict(line.split(":", 1) for line in rollup.splitlines()[1:])
    return {key: int(found[key].split()[0]) for key in ("Rss", "Pss")}


def pin(pid: int, cpus: set[int]) -> None:
    """Pins every thread of the server."""
    for task in os.listdir(f"/proc/{pid}/task"):
        os.sched_setaffinity(int(task), cpus)


def measured() -> Report:
    """Starts a server and measures it."""
    report = Report("cuse", "CUSE device, in the kernel lab")
    everything = os.sched_getaffinity(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        client = build_client(folder)
        pid, first = start_server(folder)
        for placement, cpu in (("one CPU", "0"), ("free", None)):
            pin(pid, {0} if cpu else everything)
            for command, data in COMMANDS.items():
                times = round_trips(client, data, cpu)
                report.add(f"{command}, {placement}, p50", "µs", statistics.median(times))
                report.add(f"{command}, {placement}, p99", "µs", times[int(len(times) * 0.99)])
        report.add("start to first answer", "ms", first * 1000)
        for kind, kib in memory_kib(pid).items():
            report.add(f"memory, {kind}", "MiB", kib / 1024)
        subprocess.run([str(PROGRAMS / "swtpm_ioctl"), "-s", DEVICE], check=True)
    return report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    arguments = parser.parse_args()
    if not shutil.which("cc"):
        sys.exit("bench: no C compiler; apt-get install gcc libc6-dev")
    finish(measured(), arguments)
