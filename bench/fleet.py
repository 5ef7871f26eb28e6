"""Times and memory of a manager of many TPMs.

.venv/bin/python bench/fleet.py [--sleepers 200]

In one process with the manager: what is measured is what a client of a socket sees. Memory is the
kernel's proportional set size (PSS), which divides what processes share. The round trip of a TPM that
is awake is beside that of a `swtpm socket` of ours, in the column of the C suite; so is, of one that is
manufactured, the time without a pool.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

from bench.report import Report, add_arguments, finish
from vtpm_cuse.fleet.base import Spec
from vtpm_cuse.fleet.manager import Manager, Settings, managed

if TYPE_CHECKING:
    from collections.abc import Iterator

SWTPM: Final = str(Path(sys.executable).parent / "swtpm")
GET_RANDOM: Final = bytes.fromhex("80010000000c0000017b0010")
ROUNDS: Final = 10
ROUND_TRIPS: Final = 500
WAKES: Final = 100
AWAKE: Final = 10
LAZY: Final = 3600.0
POOL: Final = 8


def answered(connection: socket.socket) -> float:
    """Milliseconds of one command."""
    begun = time.perf_counter()
    connection.sendall(GET_RANDOM)
    if not connection.recv(4096):
        sys.exit("bench: a TPM did not answer")
    return (time.perf_counter() - begun) * 1000


def connected(path: str) -> socket.socket:
    """A client."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    return connection


def pss(process: int) -> float:
    """KiB of memory that are a process' share."""
    for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return float(line.split()[1])
    return 0.0


def percentile(times: list[float], part: float) -> float:
    """The time within which that part of all was done."""
    return sorted(times)[min(len(times) - 1, int(len(times) * part))]


@contextlib.contextmanager
def lone(folder: Path) -> Iterator[socket.socket]:
    """A client of a TPM without a manager."""
    folder.mkdir()
    path = folder / "data"
    words = [SWTPM, "socket", "--tpm2", "--tpmstate", f"dir={folder}"]
    words += ["--server", f"type=unixio,path={path}", "--flags", "not-need-init,startup-clear"]
    with subprocess.Popen(words) as process:
        try:
            while not path.exists():
                time.sleep(0.01)
            with connected(str(path)) as connection:
                yield connection
        finally:
            process.terminate()


async def measure(report: Report, folder: Path, sleepers: int) -> None:
    """All figures of one manager."""
    settings = Settings(str(folder / "state"), str(folder / "run"), idle=LAZY)
    async with managed(settings) as manager:
        with contextlib.ExitStack() as undo:
            clients: dict[str, socket.socket] = {}
            first: list[float] = []
            before = pss(os.getpid())
            for number in range(sleepers):
                name = f"t{number}"
                begun = time.perf_counter()
                await manager.create(Spec(name, os.geteuid()))
                found = await manager.start(name)
                clients[name] = undo.enter_context(connected(found.sockets["data"]))
                await trio.to_thread.run_sync(answered, clients[name])
                first.append((time.perf_counter() - begun) * 1000)
                await manager.hibernate(name)
            report.add("create, start, first answer: p50", "ms", percentile(first, 0.5))
            report.add("create, start, first answer: p99", "ms", percentile(first, 0.99))
            size = (pss(os.getpid()) - before) / sleepers
            report.add("memory of one that sleeps, in the manager", "KiB", size)
            await _wakes(report, manager, clients)
            await _awake(report, manager, clients)
            await _round_trips(report, folder, clients["t0"])
    await _manufactured(report, folder)


async def _manufactured(report: Report, folder: Path) -> None:
    """From the pool, and beside it without one, in the column of the C suite; by a CA in *folder*."""
    ca = folder / "ca"
    (folder / "swtpm-localca.conf").write_text(
        f"statedir = {ca}\nsigningkey = {ca}/key.pem\nissuercert = {ca}/cert.pem\n"
    )
    (folder / "swtpm_setup.conf").write_text("create_certs_tool = swtpm_localca\n")
    os.environ["XDG_CONFIG_HOME"] = str(folder)
    medians = []
    for most in (POOL, 0):
        state, run = folder / f"state{most}", folder / f"run{most}"
        async with managed(Settings(str(state), str(run), pool=most)) as manager:
            times = []
            for number in range(POOL):
                # So nothing is made while it is measured.
                while manager.pool.waiting < most:  # noqa: ASYNC110 - nobody else waits for it
                    await trio.sleep(0.05)
                begun = time.perf_counter()
                await manager.create(Spec(f"m{number}", os.geteuid(), manufactured=True))
                times.append((time.perf_counter() - begun) * 1000)
        medians.append(percentile(times, 0.5))
    report.add("create, manufactured, from the pool: p50", "ms", *medians)


async def _wakes(report: Report, manager: Manager, clients: dict[str, socket.socket]) -> None:
    times = []
    for name in list(clients)[:WAKES]:
        times.append(await trio.to_thread.run_sync(answered, clients[name]))
        await manager.hibernate(name)
    among = f"among {len(clients)}"
    report.add(f"wake and answer, {among}: smallest", "ms", min(times))
    report.add(f"wake and answer, {among}: p50", "ms", percentile(times, 0.5))
    report.add(f"wake and answer, {among}: p99", "ms", percentile(times, 0.99))


async def _awake(report: Report, manager: Manager, clients: dict[str, socket.socket]) -> None:
    sizes = []
    for name in list(clients)[:AWAKE]:
        await trio.to_thread.run_sync(answered, clients[name])
    for name in list(clients)[:AWAKE]:
        pid = (await manager.describe(name)).pid
        sizes.append(pss(pid) if pid is not None else 0.0)
    report.add(f"memory of one that is awake, of {AWAKE}", "KiB", statistics.median(sizes))


async def _round_trips(report: Report, folder: Path, client: socket.socket) -> None:
    def both() -> None:
        with lone(folder / "lone") as other:
            ours: list[float] = []
            theirs: list[float] = []
            for _ in range(ROUNDS):  # in turns: a change in the load meets both
                ours += [answered(client) * 1000 for _ in range(ROUND_TRIPS)]
                theirs += [answered(other) * 1000 for _ in range(ROUND_TRIPS)]
            for what, part in (("p50", 0.5), ("p99", 0.99)):
                report.add(
                    f"round trip awake: {what}",
                    "µs",
                    percentile(ours, part),
                    percentile(theirs, part),
                )

    await trio.to_thread.run_sync(both)


def main() -> None:
    """Measures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sleepers", type=int, default=200, help="how many TPMs sleep")
    add_arguments(parser)
    options = parser.parse_args()
    report = Report("fleet", "vtpmd, many TPMs of one host")
    with tempfile.TemporaryDirectory() as folder:
        trio.run(measure, report, Path(folder), max(AWAKE, options.sleepers))
    report.notes.append("C suite: here, a `swtpm socket` of ours without a manager.")
    finish(report, options)


if __name__ == "__main__":
    main()
