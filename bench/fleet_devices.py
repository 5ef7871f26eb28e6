"""Many TPMs of `vtpmd` as CUSE devices: run in the kernel lab.

./setup lab --timeout 6000 -- .venv/bin/python bench/fleet_devices.py [--devices 1000]

Each is imported, started and used by a client that stays, sleeps, goes on in a manager that has begun
anew, and is removed. Who measures sits in the lab, where everything takes five to twelve times as
long as on the host. Memory of processes is the kernel's proportional set size (PSS); that of the
kernel is what it counts as its own (Slab, page tables, stacks) and grows meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import sys
import tempfile
import time
import uuid
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from bench.fleet import GET_RANDOM, Host, percentile
from bench.report import Report, add_arguments, finish
from vtpm_cuse.client.manager import Manager
from vtpm_cuse.errors import FrontendError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

IN_LAB: Final = True
DEVICES: Final = 50
"""That the lab has time for in a run of all benchmarks."""
WAKES: Final = 50
MODEL: Final = "model"
"""They are all copies of it: to make one takes a process, and no device."""
_KERNELS: Final = ("Slab", "PageTables", "KernelStack", "Percpu")
_SUCCESS: Final = bytes(4)


def answered(fd: int) -> None:
    """One command, on an open device."""
    os.write(fd, GET_RANDOM)
    if os.read(fd, 4096)[6:10] != _SUCCESS:
        sys.exit("bench: a TPM did not answer")


def milliseconds(work: Callable[[], object]) -> float:
    """Of one."""
    begun = time.perf_counter()
    work()
    return (time.perf_counter() - begun) * 1000


def of_kernel() -> float:
    """KiB."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    sizes = {name.rstrip(":"): float(value) for name, value, *_ in map(str.split, lines)}
    return sum(sizes[name] for name in _KERNELS)


def add(report: Report, what: str, times: Iterable[float]) -> None:
    """What it takes each."""
    found = list(times)
    report.add(f"{what}: p50", "ms", percentile(found, 0.5))
    report.add(f"{what}: largest", "ms", max(found))
    print(f"bench: {what}: {sum(found) / 1000:.1f} s in all", file=sys.stderr)


def begun_anew(host: Host) -> None:
    """Returns when the manager that has taken its place answers."""
    events = host.manager.watch()
    host.begin_anew()
    with contextlib.suppress(FrontendError):
        list(events)
    while True:
        try:
            host.manager = Manager(host.path)
            host.manager.list()
        except FrontendError:
            time.sleep(0.01)
        else:
            return


def measure(report: Report, host: Host, count: int) -> None:
    """All figures."""
    names = [f"t{number}" for number in range(count)]
    manager = host.manager
    clients: dict[str, int] = {}

    def used(name: str) -> None:
        clients[name] = os.open(f"/dev/vtpmd-{name}", os.O_RDWR)
        answered(clients[name])

    manager.create(MODEL)
    archive = manager.export(MODEL)
    kernel, processes = of_kernel(), host.pss()
    made, started, first, slept = [], [], [], []
    for name in names:
        copy = archive._replace(id=str(uuid.uuid4()), name=name)
        made.append(milliseconds(partial(manager.import_tpm, copy, interface="cuse")))
        started.append(milliseconds(partial(manager.start, name)))
        first.append(milliseconds(partial(used, name)))
        slept.append(milliseconds(partial(manager.hibernate, name)))
    add(report, "import", made)
    add(report, "start, with two devices", started)
    add(report, "open and first answer", first)
    add(report, "sleep", slept)
    time.sleep(1)  # what was awake has ended, and is replaced
    report.add("memory of one that sleeps, processes", "KiB", (host.pss() - processes) / count)
    report.add("memory of one that sleeps, the kernel's", "KiB", (of_kernel() - kernel) / count)
    some = names[:: max(1, count // WAKES)]
    add(
        report, "wake and answer", (milliseconds(partial(answered, clients[name])) for name in some)
    )
    for name in some:
        manager.hibernate(name)
    restart = milliseconds(lambda: begun_anew(host))
    report.add("restart of the manager, all of them asleep", "ms", restart)
    manager = host.manager
    add(
        report,
        "the next answer behind it",
        (milliseconds(partial(answered, clients[n])) for n in names),
    )
    for fd in clients.values():
        os.close(fd)
    add(report, "remove", (milliseconds(partial(manager.remove, n, force=True)) for n in names))
    if left := list(Path("/dev").glob("vtpmd*")):
        sys.exit(f"bench: {len(left)} devices are left")


def main() -> None:
    """Measures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=DEVICES, help="how many TPMs, of two each")
    add_arguments(parser)
    options = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    report = Report("fleet_devices", "vtpmd, TPMs as CUSE devices, in the kernel lab")
    with tempfile.TemporaryDirectory() as folder:
        host = Host(Path(folder) / "host")
        try:
            measure(report, host, options.devices)
        finally:
            host.end()
    report.notes.append(f"{options.devices} TPMs, two devices each, one of them open all the time.")
    finish(report, options)


if __name__ == "__main__":
    main()
