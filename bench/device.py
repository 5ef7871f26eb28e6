"""Round trips on a device file, and what the server needs for it: shared by cuse.py, fuse.py, proxy.py."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from bench.report import Report

PROGRAMS: Final = Path(sys.executable).parent
COMMANDS: Final = {
    "GetRandom": "80010000000c0000017b0010",
    "PCR_Read": "8001000000140000017e00000001000b03010000",
    "PCR_Extend": (
        "80020000004100000182000000100000000940000009000001000000000001000b" + "11" * 32
    ),
}
COUNT: Final = 2000


def measure(
    report: Report, device: Path, words: Sequence[str], limits: Mapping[str, float]
) -> None:
    """Starts a server in the background, measures it and ends it.

    Args:
        report: Gets the rows.
        device: What the server serves.
        words: Program and options that make it, but for state and pid file.
        limits: Name of a row to its limit.
    """
    if not shutil.which("cc"):
        sys.exit("bench: no C compiler; apt-get install gcc libc6-dev")
    everything = os.sched_getaffinity(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        client = build_client(folder)
        pid, first = _start_server(folder, device, words)
        for placement, cpu in (("one CPU", "0"), ("free", None)):
            _pin(pid, {0} if cpu else everything)
            for command, data in COMMANDS.items():
                times = round_trips(client, device, data, cpu)
                percentiles = {
                    "p50": statistics.median(times),
                    "p99": times[int(len(times) * 0.99)],
                }
                for percentile, value in percentiles.items():
                    what = f"{command}, {placement}, {percentile}"
                    report.add(what, "µs", value, limit=limits.get(what))
        report.add("start to first answer", "ms", first * 1000)
        for kind, kib in memory_kib(pid).items():
            report.add(f"memory, {kind}", "MiB", kib / 1024)
        subprocess.run([PROGRAMS / "swtpm_ioctl", "-s", device], check=True)


def build_client(folder: Path) -> Path:
    """Compiles the C client."""
    client = folder / "device_client"
    source = Path(__file__).parent / "device_client.c"
    subprocess.run(["cc", "-O2", "-o", client, source], check=True)
    return client


def _start_server(folder: Path, device: Path, words: Sequence[str]) -> tuple[int, float]:
    """Its pid and the seconds to its first answer."""
    state, pid_file = folder / "state", folder / "pid"
    started = time.perf_counter()
    subprocess.run(
        [*words, "--tpmstate", f"dir={state}", "--pid", f"file={pid_file}"],
        check=True,
        stderr=subprocess.DEVNULL,
    )
    fd = os.open(device, os.O_RDWR)
    os.write(fd, bytes.fromhex(COMMANDS["GetRandom"]))
    os.read(fd, 4096)
    seconds = time.perf_counter() - started
    os.close(fd)
    return int(pid_file.read_text()), seconds


def round_trips(
    client: Path, device: Path, command: str, cpu: str | None, count: int = COUNT
) -> list[float]:
    """Sorted durations in microseconds."""
    pinned = ["taskset", "-c", cpu] if cpu else []
    run = subprocess.run(
        [*pinned, str(client), str(device), str(count), command],
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


def _pin(pid: int, cpus: set[int]) -> None:
    """Pins every thread of the server."""
    for task in os.listdir(f"/proc/{pid}/task"):
        os.sched_setaffinity(int(task), cpus)
