"""Speed and memory of `swtpm socket` beside Debian's.

.venv/bin/python bench/sockets.py

Both servers get the same commands over the same kind of socket from the same C client
(stream_client.c), in turns, so that a change in the machine's load meets both. Client and server
are pinned, once to one CPU and once to two: left to the scheduler, runs jump between those. A third
server shows what the machine allows on two: it is in C, has no TPM, and never sleeps
(spinning_server.c).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from bench.report import Report, add_arguments, finish

if TYPE_CHECKING:
    from collections.abc import Iterator

OURS: Final = str(Path(sys.executable).parent / "swtpm")
COMMANDS: Final = {
    "GetRandom": "80010000000c0000017b0010",
    "PCR_Read": "8001000000140000017e00000001000b03010000",
    "PCR_Extend": (
        "80020000004100000182000000100000000940000009000001000000000001000b" + "11" * 32
    ),
}
PLACEMENTS: Final = ("one CPU", "two CPUs")
WARM_UP: Final = 200
TARGETS: Final = {"one CPU": 1.3, "two CPUs": 0.35}
TARGET_COMMAND: Final = "GetRandom"
FLOOR: Final = PLACEMENTS[1], TARGET_COMMAND
FIRST_ANSWER_MS: Final = 100


@dataclass
class Server:
    """One of the two programs, and what was measured of it.

    Attributes:
        times: Placement and command to round trips in microseconds.
        cpu: Placement and command to the server's CPU time in microseconds a command.
        starts: Milliseconds from exec to the first answer.
        memory: KiB, by the kernel's names.
    """

    name: str
    program: str
    path: Path
    process: subprocess.Popen[bytes] | None = None
    times: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    cpu: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    starts: list[float] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)

    def start(self) -> float:
        """Starts the program; returns the milliseconds to its first answer."""
        self.path.unlink(missing_ok=True)
        begun = time.perf_counter()
        self.process = subprocess.Popen([self.program, *self.words()])
        with contextlib.closing(self._connected()) as connection:
            connection.sendall(bytes.fromhex(COMMANDS["GetRandom"]))
            if not connection.recv(4096):
                sys.exit(f"bench: {self.program} did not answer")
            return (time.perf_counter() - begun) * 1000

    def words(self) -> tuple[str, ...]:
        """The options."""
        return (
            *("socket", "--tpm2", "--tpmstate", f"dir={self.path.parent}", "--log", "file=-"),
            *("--server", f"type=unixio,path={self.path}", "--flags", "startup-clear"),
        )

    def _connected(self) -> socket.socket:
        """A new connection, as soon as there can be one."""
        while True:
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(str(self.path))
            except OSError:
                connection.close()
                if self.process is None or self.process.poll() is not None:
                    sys.exit(f"bench: {self.program} ended at once")
                time.sleep(0.0005)
            else:
                return connection

    def stop(self) -> None:
        """Ends the program in order."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait()
            self.process = None

    @property
    def pid(self) -> int:
        """The running program's."""
        if self.process is None:
            raise ValueError(f"{self.name} does not run")
        return self.process.pid

    def cpu_seconds(self) -> float:
        """CPU time of all its threads so far."""
        total = 0
        for task in os.listdir(f"/proc/{self.pid}/task"):
            total += int(Path(f"/proc/{self.pid}/task/{task}/schedstat").read_text().split()[0])
        return total / 1e9

    def pin(self, cpu: int) -> None:
        """Pins every thread."""
        for task in os.listdir(f"/proc/{self.pid}/task"):
            os.sched_setaffinity(int(task), {cpu})

    def measure(self, client: Path, placement: str, command: str, cpu: int, count: int) -> None:
        """One series of round trips from a client on *cpu*."""
        before = self.cpu_seconds()
        run = subprocess.run(
            [
                *("taskset", "-c", str(cpu), str(client), str(self.path)),
                *(str(WARM_UP), str(count), COMMANDS[command]),
            ],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        used = (self.cpu_seconds() - before) * 1e6 / (WARM_UP + count)
        key = (placement, command)
        self.cpu.setdefault(key, []).append(used)
        self.times.setdefault(key, []).extend(int(line) / 1000 for line in run.stdout.split())

    def take_memory(self) -> None:
        """Resident and proportional memory after the work."""
        rollup = Path(f"/proc/{self.pid}/smaps_rollup").read_text()
        found = dict(line.split(":", 1) for line in rollup.splitlines()[1:])
        self.memory = {key: int(found[key].split()[0]) for key in ("Rss", "Pss", "Private_Dirty")}


class SpinningServer(Server):
    """The one without a TPM. While it runs, it takes a whole CPU."""

    def words(self) -> tuple[str, ...]:
        """Where it listens."""
        return (str(self.path),)


def build(folder: Path, name: str) -> Path:
    """Compiles a C program of this folder."""
    program = folder / name
    source = Path(__file__).parent / f"{name}.c"
    subprocess.run(["cc", "-O2", "-o", str(program), str(source)], check=True)
    return program


@contextlib.contextmanager
def servers(ours: str, peer: str) -> Iterator[list[Server]]:
    """Both, not started yet."""
    with contextlib.ExitStack() as stack:
        found = []
        for name, program in (("vtpm-cuse", ours), ("C suite", peer)):
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            server = Server(name, program, Path(folder) / "socket")
            stack.callback(server.stop)
            found.append(server)
        yield found


def percentile(times: list[float], part: float) -> float:
    """A value that *part* of the times do not exceed."""
    return sorted(times)[min(len(times) - 1, int(len(times) * part))]


def report_of(ours: Server, peer: Server, spinning: Server) -> Report:
    """What was measured, with the limits of what is promised."""
    report = Report("sockets", "Unix socket, `swtpm socket`")
    for placement in PLACEMENTS:
        for command in COMMANDS:
            key = (placement, command)
            for name, part in (("p50", 0.5), ("p99", 0.99)):
                promised = command == TARGET_COMMAND and name == "p50"
                report.add(
                    f"{command}, {placement}, {name}",
                    "µs",
                    percentile(ours.times[key], part),
                    percentile(peer.times[key], part),
                    TARGETS[placement] if promised else None,
                )
            report.add(
                f"{command}, {placement}, server CPU",
                "µs",
                statistics.median(ours.cpu[key]),
                statistics.median(peer.cpu[key]),
            )
    report.add(
        f"{FLOOR[1]}, {FLOOR[0]}, p50 of a C server that spins and has no TPM",
        "µs",
        percentile(spinning.times[FLOOR], 0.5),
        percentile(peer.times[FLOOR], 0.5),
    )
    first, peer_first = statistics.median(ours.starts), statistics.median(peer.starts)
    limit = FIRST_ANSWER_MS / peer_first
    report.add("exec to first answer, median", "ms", first, peer_first, limit)
    for name in ours.memory:
        report.add(f"memory, {name}", "MiB", ours.memory[name] / 1024, peer.memory[name] / 1024)
    return report


def main() -> None:
    """Measures and prints; with --check, ends with 1 when a limit was missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--peer", default="/usr/bin/swtpm", help="the C suite's program")
    parser.add_argument("--ours", default=OURS, help="this package's program")
    parser.add_argument("--count", type=int, default=2000, help="round trips a series (2000)")
    parser.add_argument("--rounds", type=int, default=5, help="series of each kind (5)")
    parser.add_argument("--starts", type=int, default=9, help="starts of each program (9)")
    add_arguments(parser)
    options = parser.parse_args()
    for program in ("cc", "taskset", options.peer):
        if not shutil.which(program):
            sys.exit(f"bench: {program} is missing; apt-get install gcc libc6-dev swtpm")
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < len(PLACEMENTS):
        sys.exit("bench: needs two CPUs")
    with tempfile.TemporaryDirectory() as name, servers(options.ours, options.peer) as (ours, peer):
        folder = Path(name)
        client = build(folder, "stream_client")
        program = str(build(folder, "spinning_server"))
        spinning = SpinningServer("spinning", program, folder / "socket")
        for _ in range(options.starts):
            for server in (ours, peer):
                server.stop()
                server.starts.append(server.start())
        for _ in range(options.rounds):
            for placement, cpu in zip(PLACEMENTS, cpus, strict=False):
                for command in COMMANDS:
                    for server in (ours, peer):
                        server.pin(cpus[0])
                        server.measure(client, placement, command, cpu, options.count)
                    if (placement, command) == FLOOR:
                        spinning.start()
                        spinning.pin(cpus[0])
                        spinning.measure(client, placement, command, cpu, options.count)
                        spinning.stop()
        for server in (ours, peer):
            server.take_memory()
        report = report_of(ours, peer, spinning)
    finish(report, options)


if __name__ == "__main__":
    main()
