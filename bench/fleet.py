"""Times and memory of `vtpmd`, the manager of many TPMs.

.venv/bin/python bench/fleet.py [--sleepers 200] [--peer /usr/bin/swtpm]

The programs are started as their users do, and what is measured is what a client of a socket sees.
Where the limit of descriptors is too low for so many sleepers, there is more than one manager.
Memory of all is the kernel's proportional set size (PSS), which divides what processes share, and
what the kernel itself has more of than before; that of one that is awake is what it shares with
none. Beside a first answer, and a wake, is the C suite's first answer, from its exec on: its TPM
takes a process, or it has to be started. Beside a TPM that sleeps is such a process that nobody
uses; beside one of the pool a `swtpm_setup`; beside the round trip of a TPM that is awake that of a
`swtpm socket` of ours, without a manager, in the same column.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from bench.report import Report, add_arguments, finish
from bench.setup import CASES, OURS, PEER, Side
from vtpm_cuse.client.manager import Manager
from vtpm_cuse.errors import FrontendError

if TYPE_CHECKING:
    from collections.abc import Iterator

PROGRAMS: Final = Path(sys.executable).parent
GET_RANDOM: Final = bytes.fromhex("80010000000c0000017b0010")
ROUNDS: Final = 10
ROUND_TRIPS: Final = 500
WAKES: Final = 300
AWAKE: Final = 10
STARTS: Final = 20
SETUPS: Final = 5
POOL_SECONDS: Final = 2.0
"""In which a pool has what it lacks again."""
MANY: Final = 10_000
LAZY_SECONDS: Final = 36000
PAUSE_SECONDS: Final = 0.03
"""Between two that wake: a host on which all wake at once is another measurement."""
DESCRIPTORS: Final = 6
"""Of a TPM that sleeps with one client: three listeners, folder, lock, connection."""
OTHER_DESCRIPTORS: Final = 300
FIRST_ANSWER_MS: Final = 5.0
MANUFACTURED_MS: Final = 10.0
WAKE_P50_MS: Final = 2.0
WAKE_P99_MS: Final = 5.0
ASLEEP_KIB: Final = 30.0
ASLEEP_MIB: Final = 300.0
"""Of so many, in all."""
AWAKE_MIB: Final = 5.5
ROUND_TRIP: Final = 1.05
_TICK_MS: Final = 1000 / os.sysconf("SC_CLK_TCK")


class Host:
    """One manager with its processes, and the clients of its TPMs, by name."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.clients: dict[str, socket.socket] = {}
        words = [str(PROGRAMS / "vtpmd"), "--state", str(folder / "state")]
        words += ["--run", str(folder / "run"), "--idle", str(LAZY_SECONDS)]
        words += ["--quota", "tpms=1000000", "--log", "file=-"]
        Side(OURS, folder / "config")
        found = {**os.environ, "XDG_CONFIG_HOME": str(folder / "config")}
        self._process = subprocess.Popen(words, env=found)
        self.path = str(folder / "run/manager.sock")
        while True:
            try:
                self.manager = Manager(self.path)
                break
            except FrontendError:
                if self._process.poll() is not None:
                    sys.exit("bench: vtpmd does not start")
                time.sleep(0.01)

    def begin_anew(self) -> None:
        """Has the manager begin anew; who asks it has to connect again."""
        self._process.send_signal(signal.SIGUSR2)

    def end(self) -> None:
        """Ends all of it, and what was stored is not looked at any more."""
        for client in self.clients.values():
            client.close()
        self.manager.close()
        self._process.kill()
        self._process.wait()

    def processes(self) -> list[int]:
        """The manager, its zygote, and the workers."""
        found = [self._process.pid]
        for pid in found:  # which grows meanwhile
            with contextlib.suppress(OSError):
                children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
                found += map(int, children.split())
        return found

    def pss(self) -> float:
        """KiB of all of them."""
        return sum(memory(pid)["Pss"] for pid in self.processes())

    def cpu(self) -> float:
        """Milliseconds of manager and zygote, and of workers that have ended."""
        manager, zygote, *_ = self.processes()
        return sum(sum(ticks(pid)[:2]) for pid in (manager, zygote)) + sum(ticks(zygote)[2:])


def memory(pid: int) -> dict[str, float]:
    """KiB by the kernel's names."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    lines = [line.split() for line in text.splitlines()[1:]]
    return {name.rstrip(":"): float(value) for name, value, _ in lines}


def kernel_memory() -> float:
    """KiB that the kernel has for what processes hold."""
    text = Path("/proc/meminfo").read_text(encoding="ascii")
    found = {name: float(rest.split()[0]) for name, _, rest in map(_cut, text.splitlines())}
    return sum(found[name] for name in ("Slab", "KernelStack", "PageTables"))


def _cut(line: str) -> tuple[str, str, str]:
    return line.partition(":")


def private(pid: int) -> float:
    """KiB that a process shares with none."""
    found = memory(pid)
    return found["Private_Dirty"] + found["Private_Clean"]


def ticks(pid: int) -> list[float]:
    """Milliseconds: its own in user mode and in the kernel, and those of its children."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return [int(field) * _TICK_MS for field in fields[11:15]]


def answered(connection: socket.socket) -> float:
    """Milliseconds of one command."""
    begun = time.perf_counter()
    connection.sendall(GET_RANDOM)
    if not connection.recv(4096):
        sys.exit("bench: a TPM did not answer")
    return (time.perf_counter() - begun) * 1000


def connected(path: str) -> socket.socket:
    """A client, as soon as there can be one."""
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            time.sleep(0.0001)
        else:
            return connection


def percentile(times: list[float], part: float) -> float:
    """The time within which that part of all was done."""
    return sorted(times)[min(len(times) - 1, int(len(times) * part))]


class Lone(NamedTuple):
    """A TPM without a manager: its process, and its client."""

    pid: int
    client: socket.socket


@contextlib.contextmanager
def lone(program: str, folder: Path) -> Iterator[Lone]:
    """A TPM without a manager, once it has answered; that takes a new folder."""
    folder.mkdir()
    path = str(folder / "data")
    words = [program, "socket", "--tpm2", "--tpmstate", f"dir={folder}", "--log", "file=-"]
    words += ["--server", f"type=unixio,path={path}", "--flags", "not-need-init,startup-clear"]
    # In a session of its own, as those of a manager: the kernel shares processors out by sessions,
    # and has who is of the client's on the client's processor, which is another measurement.
    with subprocess.Popen(words, start_new_session=True) as process:
        try:
            with connected(path) as connection:
                answered(connection)
                yield Lone(process.pid, connection)
        finally:
            process.kill()


def first_answers(host: Host, names: list[str]) -> list[float]:
    """Milliseconds from nothing to the first answer; then each sleeps, its client stays."""
    times = []
    for name in names:
        time.sleep(PAUSE_SECONDS)
        begun = time.perf_counter()
        host.manager.create(name)
        path = host.manager.start(name).sockets["data"]
        host.clients[name] = connected(path)
        answered(host.clients[name])
        times.append((time.perf_counter() - begun) * 1000)
        host.manager.hibernate(name)
    return times


def first_answers_of(program: str, folder: Path) -> list[float]:
    """The same, from the exec of a program without a manager."""
    times = []
    for number in range(STARTS):
        begun = time.perf_counter()
        with lone(program, folder / f"start{number}"):
            times.append((time.perf_counter() - begun) * 1000)
    return times


class Peer(NamedTuple):
    """What the C suite takes: to first answers, ms; for a process, KiB; for a set-up, ms."""

    starts: list[float]
    pss: float
    private: float
    setup: float | None

    @classmethod
    def measured(cls, program: str, folder: Path) -> Peer | None:
        """None where it is not installed."""
        if not Path(program).exists():
            return None
        with contextlib.ExitStack() as undo:
            ones = [
                undo.enter_context(lone(program, folder / f"awake{number}")).pid
                for number in range(AWAKE)
            ]
            pss = statistics.median(memory(pid)["Pss"] for pid in ones)
            own = statistics.median(map(private, ones))
        setup = None
        if Path(PEER).exists():
            side = Side(PEER, folder / "setup")
            side.seconds(CASES[0])  # not counted: the CA is made
            setup = statistics.median(side.seconds(CASES[0]) for _ in range(SETUPS)) * 1000
        return cls(first_answers_of(program, folder), pss, own, setup)


def add(report: Report, what: str, unit: str, ours: float, peer: float | None, most: float) -> None:
    """A row, of which ours may be *most* of that unit."""
    report.add(what, unit, ours, peer, most / peer if peer else most)


def measure(report: Report, folder: Path, sleepers: int, program: str) -> None:
    """All figures."""
    room = resource.getrlimit(resource.RLIMIT_NOFILE)[1] - OTHER_DESCRIPTORS
    share = min(sleepers, room // DESCRIPTORS)
    counts = [min(share, sleepers - begun) for begun in range(0, sleepers, share)]
    peer, kernel = Peer.measured(program, folder), kernel_memory()
    with contextlib.ExitStack() as undo:
        hosts = [Host(folder / f"host{number}") for number in range(len(counts))]
        for host in hosts:
            undo.callback(host.end)
            first_answers(host, [f"first{number}" for number in range(AWAKE)])
        time.sleep(1)
        before = sum(host.pss() for host in hosts)  # with what it has but once
        first = []
        for host, count in zip(hosts, counts, strict=True):
            first += first_answers(host, [f"t{number}" for number in range(count)])
        what, starts = "create, start, first answer", peer.starts if peer else None
        theirs = percentile(starts, 0.5) if starts else None
        add(report, f"{what}: p50", "ms", percentile(first, 0.5), theirs, FIRST_ANSWER_MS)
        report.add(f"{what}: smallest", "ms", min(first), min(starts) if starts else None)
        time.sleep(1)  # what was awake has ended, and is replaced
        size = sum(host.pss() for host in hosts)
        one = (size - before) / sleepers
        add(report, "memory of one that sleeps", "KiB", one, peer and peer.pss, ASLEEP_KIB)
        whole = (size + kernel_memory() - kernel) / 1024
        limit = ASLEEP_MIB if sleepers >= MANY else None
        report.add(f"memory of all, {sleepers} asleep", "MiB", whole, limit=limit)
        wakes(report, hosts, theirs)
        manufactured(report, hosts[0], peer and peer.setup)
        awake(report, hosts[0], peer and peer.private)
        round_trips(report, folder, hosts[0].clients["t0"])
    report.notes.append(
        f"Asleep: {sleepers}, in {len(hosts)} manager{'s' if len(hosts) > 1 else ''}, each with a client."
    )


def manufactured(report: Report, host: Host, peer: float | None) -> None:
    """Those of the pool, which begins with the first."""
    times = []
    for number in range(SETUPS + 1):
        begun = time.perf_counter()
        host.manager.create(f"made{number}", manufactured=True)
        times.append((time.perf_counter() - begun) * 1000)
        time.sleep(POOL_SECONDS)
    what = "create --manufactured, from the pool: p50"
    add(report, what, "ms", percentile(times[1:], 0.5), peer, MANUFACTURED_MS)


def wakes(report: Report, hosts: list[Host], peer: float | None) -> None:
    """One after the other, in random order."""
    chance = random.Random(1)  # noqa: S311
    begun, times = sum(host.cpu() for host in hosts), []
    for _ in range(WAKES):
        host = chance.choice(hosts)
        name = chance.choice(list(host.clients))
        time.sleep(PAUSE_SECONDS)
        times.append(answered(host.clients[name]))
        host.manager.hibernate(name)
    cpu = (sum(host.cpu() for host in hosts) - begun) / WAKES
    report.add("wake and answer: smallest", "ms", min(times))
    add(report, "wake and answer: p50", "ms", percentile(times, 0.5), peer, WAKE_P50_MS)
    report.add("wake and answer: p99", "ms", percentile(times, 0.99), limit=WAKE_P99_MS)
    report.add("processor time of a wake, a sleep and a new blank process", "ms", cpu)


def awake(report: Report, host: Host, peer: float | None) -> None:
    """What their processes share with none."""
    names = list(host.clients)[:AWAKE]
    for name in names:
        answered(host.clients[name])
    processes = [host.manager.describe(name).pid for name in names]
    median = statistics.median(private(pid) for pid in processes if pid is not None) / 1024
    what, theirs = f"memory of one that is awake, of {AWAKE}", peer and peer / 1024
    add(report, what, "MiB", median, theirs, AWAKE_MIB)


def round_trips(report: Report, folder: Path, client: socket.socket) -> None:
    """In turns: a change in the load meets both."""
    with lone(str(PROGRAMS / "swtpm"), folder / "lone") as other:
        ours: list[float] = []
        theirs: list[float] = []
        for _ in range(ROUNDS):
            ours += [answered(client) * 1000 for _ in range(ROUND_TRIPS)]
            theirs += [answered(other.client) * 1000 for _ in range(ROUND_TRIPS)]
    for what, part in (("p50", 0.5), ("p99", 0.99)):
        limit = ROUND_TRIP if what == "p50" else None
        report.add(
            *(f"round trip awake: {what}", "µs", percentile(ours, part), percentile(theirs, part)),
            limit,
        )


def main() -> None:
    """Measures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sleepers", type=int, default=200, help="how many TPMs sleep")
    parser.add_argument("--peer", default="/usr/bin/swtpm", help="the C suite's program")
    add_arguments(parser)
    options = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    report = Report("fleet", "vtpmd, many TPMs of one host")
    with tempfile.TemporaryDirectory() as folder:
        measure(report, Path(folder), max(AWAKE, options.sleepers), options.peer)
    report.notes.append(
        "C suite: in wakes, its start; of one that sleeps, a process of its that nobody uses; in round "
        "trips, a `swtpm socket` of ours without a manager."
    )
    finish(report, options)


if __name__ == "__main__":
    main()
