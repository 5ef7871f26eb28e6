"""`vtpmd` for a long time, with deaths: a line of JSON after each quarter, and one for the end.

    .venv/bin/python bench/endurance.py --minutes 60 --tpms 10000 --users 200

So many users take one of the TPMs after the other, at random, and give it commands: each writes a
number into NV, extends a PCR, and takes random bytes. Meanwhile workers are killed, the process that
they are forked from, and the manager, which is also told to begin anew. What a TPM has acknowledged
must be there when somebody looks again: the number, the PCR unless the TPM was reset, and no random
bytes may come twice. In the end the manager is killed, and every TPM is looked at once more. The
exit status is 1 if anything was lost.

Where the limit of descriptors is too low for so many TPMs, there is more than one manager.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.fleet import DESCRIPTORS, OTHER_DESCRIPTORS, PROGRAMS, memory
from tests.support import commands as tpm
from vtpm_cuse.client.manager import Manager
from vtpm_cuse.errors import FleetError, FrontendError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SIZE: Final = 8
PCR: Final = 16
PATIENCE_SECONDS: Final = 120.0
PARTS: Final = 4
MANAGERS_TURN: Final = 20
"""Each so many deaths are a manager's, so many others its restart, or that of the zygote."""
TPM_RC_FAILURE: Final = 0x101
TPM_RC_NV_DEFINED: Final = 0x14C
COMMANDS: Final = 12
"""Of a user, before the next TPM."""


class Lost(Exception):
    """Something that was acknowledged is not there."""


@dataclass
class Known:
    """What is known of a TPM by those who have used it.

    Attributes:
        written: The number that was acknowledged last; -1 where there is no place for one yet.
        begun: The number that may be there instead, for nobody has heard whether it is.
        pcr: What the PCR was; None where nobody knows.
    """

    host: Host
    name: str
    written: int = -1
    begun: int = -1
    pcr: bytes | None = None


class Host:
    """A manager that is started again when it has died."""

    def __init__(self, folder: Path, idle: int) -> None:
        self.folder = folder
        self._idle = idle
        self.folder.mkdir()
        self.path = str(self.folder / "run/manager.sock")
        self.life = 0
        self._log = (self.folder / "log").open("ab")
        self.begin()

    def begin(self) -> None:
        """Starts it, and waits until it answers."""
        words = [str(PROGRAMS / "vtpmd"), "--state", str(self.folder / "state")]
        words += ["--run", str(self.folder / "run")]
        words += ["--idle", str(self._idle), "--quota", "tpms=1000000"]
        self._process = subprocess.Popen(
            [*words, "--log", "level=1"], stdout=self._log, stderr=self._log
        )
        while True:
            with contextlib.suppress(FrontendError), Manager(self.path):
                return
            if self._process.poll() is not None:
                sys.exit(f"endurance: vtpmd does not start; see {self.folder / 'log'}")
            time.sleep(0.02)

    def die(self) -> None:
        """All its TPMs lose their power."""
        self._process.kill()
        self._process.wait()
        self.life += 1
        self.begin()

    def begin_anew(self) -> None:
        """Nobody who uses a TPM may notice."""
        self._process.send_signal(signal.SIGUSR2)

    def end(self) -> None:
        """In order."""
        self._process.terminate()
        self._process.wait()
        self._log.close()

    @property
    def pid(self) -> int:
        """Of the manager."""
        return self._process.pid

    def zygotes(self) -> list[int]:
        """The process that workers are forked from; for a moment there may be none."""
        return [pid for pid in children(self.pid) if b"zygote" in command_of(pid)]

    def workers(self) -> list[int]:
        """Blank ones, too."""
        return [worker for pid in self.zygotes() for worker in children(pid)]


def children(pid: int) -> list[int]:
    """Processes; of one that has ended, none."""
    with contextlib.suppress(OSError):
        tasks = Path(f"/proc/{pid}/task").iterdir()
        return [int(one) for task in tasks for one in (task / "children").read_text().split()]
    return []


def command_of(pid: int) -> bytes:
    """Its words."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


@dataclass
class Tally:
    """What all users have seen; one at a time changes it."""

    turn: threading.Lock = field(default_factory=threading.Lock)
    seen: set[bytes] = field(default_factory=set)
    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    lost: list[str] = field(default_factory=list)

    def add(self, what: str) -> None:
        """One more of these."""
        with self.turn:
            self.counts[what] += 1

    def see_random(self, data: bytes) -> None:
        """Raises Lost: they have been seen before."""
        with self.turn:
            if data in self.seen:
                raise Lost(f"the random bytes {data.hex()} have come twice")
            self.seen.add(data)


class User:
    """Takes TPMs, one after the other.

    Args:
        pause: Seconds between two commands, in the mean.
    """

    def __init__(self, tpms: list[Known], tally: Tally, seed: int, pause: float) -> None:
        self._tpms, self._tally = tpms, tally
        self._chance = random.Random(seed)  # noqa: S311 - repeatable, not secret
        self._pause = pause

    def use_some(self, ended: threading.Event) -> None:
        """Until that is set. None of these TPMs is anybody else's."""
        while not ended.is_set():
            self.use(self._chance.choice(self._tpms), self._chance.randrange(1, COMMANDS))

    def use(self, known: Known, commands: int) -> None:
        """Looks what there is, and gives it so many commands; a death on the way ends that."""
        try:
            with self._connected(known) as ask:
                self._look(known, ask)
                for _ in range(commands):
                    self._step(known, ask)
                    time.sleep(self._chance.expovariate(1 / self._pause))
        except (OSError, FrontendError, FleetError):
            self._tally.add("interruptions")
            known.pcr = None
            time.sleep(self._pause)
        except Lost as exc:
            with self._tally.turn:
                self._tally.lost.append(f"{known.host.folder.name} {known.name}: {exc}")
            print(json.dumps({"lost": self._tally.lost[-1]}), flush=True)

    @contextlib.contextmanager
    def _connected(self, known: Known) -> Iterator[Callable[[bytes], bytes]]:
        life = known.host.life
        with Manager(known.host.path, PATIENCE_SECONDS) as manager:
            found = manager.describe(known.name)
            if found.state == "stopped":
                known.pcr = None
                found = manager.start(known.name)
            elif found.state == "failed":
                known.pcr = None
                found = manager.reset(known.name)
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(PATIENCE_SECONDS)
            client.connect(found.sockets["data"])

            def ask(command: bytes) -> bytes:
                client.sendall(command)
                response = client.recv(4096)
                if not response:
                    raise ConnectionResetError
                self._tally.add("commands")
                if tpm.code_of(response) == TPM_RC_FAILURE or life != known.host.life:
                    raise ConnectionResetError  # it has died before
                return response

            yield ask

    def _look(self, known: Known, ask: Callable[[bytes], bytes]) -> None:
        if known.written < 0:
            code = tpm.code_of(ask(tpm.nv_define(tpm.NV_INDEX, SIZE)))
            if code not in {0, TPM_RC_NV_DEFINED}:
                raise Lost(f"no place for a number: {code:#x}")
            return self._write(known, 0, ask)
        response = ask(tpm.nv_read(tpm.NV_INDEX, SIZE))
        if code := tpm.code_of(response):
            raise Lost(f"the number {known.written} is not there: {code:#x}")
        found = int.from_bytes(tpm.nv_data(response), "big")
        if found not in {known.written, known.begun}:
            raise Lost(f"the number is {found} instead of {known.written}")
        known.written = known.begun = found
        self._tally.add("looks")
        pcr = tpm.pcr_value(ask(tpm.pcr_read(PCR)))
        if known.pcr not in {None, pcr}:
            raise Lost(f"PCR {PCR} is {pcr.hex()} instead of {known.pcr and known.pcr.hex()}")
        known.pcr = pcr
        return None

    def _step(self, known: Known, ask: Callable[[bytes], bytes]) -> None:
        match self._chance.randrange(4):
            case 0:
                self._write(known, known.written + 1, ask)
            case 1:
                known.pcr = None
                ask(tpm.pcr_extend(PCR, self._chance.randbytes(32)))
                known.pcr = tpm.pcr_value(ask(tpm.pcr_read(PCR)))
            case _:
                self._tally.see_random(ask(tpm.get_random(16))[12:])

    def _write(self, known: Known, number: int, ask: Callable[[bytes], bytes]) -> None:
        known.begun = number
        if code := tpm.code_of(ask(tpm.nv_write(tpm.NV_INDEX, number.to_bytes(SIZE, "big")))):
            raise Lost(f"the number {number} is not taken: {code:#x}")
        known.written = number
        self._tally.add("acknowledged writes")


class Sample(NamedTuple):
    """Of one moment."""

    processes: float
    all_mib: float
    managers_mib: float
    descriptors: float


def sample(hosts: list[Host]) -> Sample:
    """Memory as the kernel's PSS, of managers what they have written to.

    That is shared at first with the processes that make devices, which were forked from it, and
    with none once it has begun anew: what it shares with none would grow without a leak.
    """
    used = [pid for host in hosts for pid in (host.pid, *host.zygotes(), *host.workers())]
    size, files = 0.0, 0
    for pid in used:
        with contextlib.suppress(OSError):
            size += memory(pid)["Pss"]
    for host in hosts:
        files += len(os.listdir(f"/proc/{host.pid}/fd"))
    written = [memory(host.pid) for host in hosts]
    managers = sum(one["Private_Dirty"] + one["Shared_Dirty"] for one in written)
    return Sample(len(used), size / 1024, managers / 1024, files)


def tell(what: str, tally: Tally, samples: list[Sample]) -> None:
    """Prints what has been counted, and the medians of *samples*."""
    medians = Sample(*(round(statistics.median(those), 1) for those in zip(*samples, strict=True)))
    with tally.turn:
        found = {**dict(sorted(tally.counts.items())), "lost": len(tally.lost)}
    print(json.dumps({"part": what, **found, **medians._asdict()}), flush=True)


def kill(hosts: list[Host], chance: random.Random, tally: Tally) -> None:
    """Somebody, most often a worker."""
    host = chance.choice(hosts)
    turn = chance.randrange(MANAGERS_TURN)
    match turn:
        case 0:
            host.die()
            tally.add("deaths of managers")
        case 1:
            host.begin_anew()
            tally.add("restarts of managers")
        case 2:
            for pid in host.zygotes():
                os.kill(pid, signal.SIGKILL)
                tally.add("deaths of zygotes")
        case _:
            if workers := host.workers():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(chance.choice(workers), signal.SIGKILL)
                    tally.add("deaths of workers")


def run(folder: Path, given: argparse.Namespace) -> Tally:
    """All of it."""
    tally = Tally()
    room = (resource.getrlimit(resource.RLIMIT_NOFILE)[1] - OTHER_DESCRIPTORS) // DESCRIPTORS
    hosts = [Host(folder / f"host{n}", given.idle) for n in range(-(-given.tpms // room))]
    tpms = [Known(hosts[n % len(hosts)], f"t{n}") for n in range(given.tpms)]
    try:
        use_all(hosts, tpms, tally, given)
    finally:
        for host in hosts:
            host.end()
    return tally


def use_all(hosts: list[Host], tpms: list[Known], tally: Tally, given: argparse.Namespace) -> None:
    """While somebody dies now and then; then looks at all of them."""
    for known in tpms:
        with Manager(known.host.path) as manager:
            manager.create(known.name)
            manager.start(known.name)
    print(json.dumps({"TPMs": len(tpms), "managers": len(hosts)}), flush=True)
    ended = threading.Event()
    users = [
        User(tpms[n :: given.users], tally, given.seed + n, given.pause) for n in range(given.users)
    ]
    threads = [threading.Thread(target=user.use_some, args=(ended,)) for user in users]
    for thread in threads:
        thread.start()
    chance = random.Random(given.seed)  # noqa: S311
    length = given.minutes * 60 / PARTS
    for part in range(PARTS):
        until, samples = time.monotonic() + length, []
        while time.monotonic() < until:
            time.sleep(chance.uniform(0.5, 1.5) * given.kill)
            samples.append(sample(hosts))
            kill(hosts, chance, tally)
        tell(f"{part + 1} of {PARTS}", tally, samples)
    ended.set()
    for thread in threads:
        thread.join()
    for host in hosts:
        host.die()
    for known in tpms:
        if known.written >= 0:
            users[0].use(known, 0)
            tally.add("TPMs looked at in the end")
    tell("the end", tally, [sample(hosts)])


def main() -> None:
    """Runs it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--tpms", type=int, default=10_000)
    parser.add_argument("--users", type=int, default=200)
    parser.add_argument("--kill", type=float, default=3, help="seconds between two deaths")
    parser.add_argument("--pause", type=float, default=3, help="seconds between two commands")
    parser.add_argument("--idle", type=int, default=5, help="seconds until a TPM sleeps")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    os.nice(10)
    folder = Path(tempfile.mkdtemp(prefix="endurance"))
    tally = run(folder, given)
    if tally.lost:
        sys.exit(f"endurance: lost; the states and logs are in {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
