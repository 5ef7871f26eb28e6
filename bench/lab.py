"""What a private TPM costs a test, beside a new TPM of Debian's for each.

.venv/bin/python bench/lab.py

By turns: the TPM that the plugin of pytest lends, and what a test-suite does that has no such thing:
a folder, swtpm_setup, swtpm, a first answer, and the end of it.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from bench.report import Report, add_arguments, finish
from vtpm_cuse.client.child import program_words
from vtpm_cuse.lab import Tpm
from vtpm_cuse.lab.lender import Kind, Lender

if TYPE_CHECKING:
    from collections.abc import Callable

PEER: Final = "/usr/bin/swtpm"
PEER_SETUP: Final = "/usr/bin/swtpm_setup"
ROUNDS, REWINDS, COMMANDS = 10, 200, 500
RANDOM: Final = bytes.fromhex("80010000000c0000017b0008")


def _milliseconds(call: Callable[[], object], count: int = 1) -> float:
    begun = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - begun) * 1e3 / count


def _peer_test(folder: Path, *, set_up: bool) -> None:
    """A TPM of the C suite's from nothing to its first answer, and away again."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        if set_up:
            words = [PEER_SETUP, "--tpm2", "--tpmstate", name, "--createek", "--overwrite"]
            subprocess.run([*words, "--config", "/dev/null"], check=True, capture_output=True)
        path = f"{name}/tpm"
        words = [PEER, "socket", "--tpm2", "--tpmstate", f"dir={name}"]
        words += ["--flags", "not-need-init,startup-clear"]
        words += ["--server", f"type=unixio,path={path}", "--ctrl", f"type=unixio,path={path}.c"]
        with subprocess.Popen(words) as process, socket.socket(socket.AF_UNIX) as client:
            while client.connect_ex(path):
                time.sleep(0.0005)
                if process.poll() is not None:
                    sys.exit("bench: swtpm ended at once")
            client.sendall(RANDOM)
            client.recv(100)
            process.kill()


def _private_test() -> None:
    with Tpm() as tpm:
        tpm.command(RANDOM)


def _measure(report: Report, folder: Path) -> None:
    lender, times = Lender(trace=64), {name: list[float]() for name in ("ours", "bare", "set up")}
    first = {name: list[float]() for name in ("ours", "made")}

    def lent(kind: Kind) -> None:
        lender.lend(kind).command(RANDOM)

    try:
        for kind in (Kind(), Kind(manufactured=True)):
            lent(kind)
        for _ in range(ROUNDS):
            times["bare"].append(_milliseconds(lambda: _peer_test(folder, set_up=False)))
            times["set up"].append(_milliseconds(lambda: _peer_test(folder, set_up=True)))
            times["ours"].append(_milliseconds(lambda: lent(Kind()), REWINDS // ROUNDS))
            made = _milliseconds(lambda: lent(Kind(manufactured=True)), REWINDS // ROUNDS)
            first["made"].append(made)
            first["ours"].append(_milliseconds(_private_test))
    finally:
        lender.close()
    ours, bare, full = (statistics.median(found) for found in times.values())
    made = statistics.median(first["made"])
    report.add("a TPM with its keys for a test", "ms", made, full, limit=0.2)
    report.add("a TPM as new for a test", "ms", ours, bare)
    report.add("the slower of the two", "ms", max(ours, made), limit=3)
    report.add("a private TPM from start to end", "ms", statistics.median(first["ours"]), bare)


PEER_RUN: Final = """\
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
swtpm_setup --tpm2 --tpmstate "$folder" --createek --overwrite --config /dev/null >/dev/null
swtpm socket --tpm2 --tpmstate "dir=$folder" --flags not-need-init,startup-clear --daemon \\
    --pid "file=$folder/pid" --server "type=unixio,path=$folder/tpm" \\
    --ctrl "type=unixio,path=$folder/ctrl"
true
kill "$(cat "$folder/pid")"
"""
"""What a person writes who has swtpm and no `vtpm run`."""


def _commands_with_a_tpm(report: Report) -> None:
    ours = [*program_words("vtpm_cuse.cli.vtpm.vtpm"), "run", "true"]
    times: dict[str, list[float]] = {"ours": [], "peer": []}
    env = {**os.environ, "PATH": f"/usr/bin:{os.environ['PATH']}"}
    for _ in range(ROUNDS):
        for name, words in (("ours", ours), ("peer", ["sh", "-c", PEER_RUN])):
            call = partial(subprocess.run, words, check=True, env=env, stdout=subprocess.DEVNULL)
            times[name].append(_milliseconds(call))
    found = {name: statistics.median(each) for name, each in times.items()}
    report.add("vtpm run true, a script with swtpm", "ms", found["ours"], found["peer"])
    report.add("vtpm run true", "ms", found["ours"], limit=250)


def _snapshots(report: Report) -> None:
    with Tpm() as tpm:
        report.add("snapshot", "ms", _milliseconds(tpm.snapshot, REWINDS))
        kept = tpm.snapshot()
        report.add("rewind", "ms", _milliseconds(lambda: tpm.rewind(kept), REWINDS))


def _commands(report: Report) -> None:
    with Tpm() as plain, Tpm(faults=True) as relayed, Tpm(trace=64) as traced:
        found: dict[Tpm, list[float]] = {plain: [], relayed: [], traced: []}
        for tpm in found:
            tpm.command(RANDOM)
        for _ in range(ROUNDS):
            for tpm, times in found.items():
                times.append(_milliseconds(partial(tpm.command, RANDOM), COMMANDS) * 1e3)
        report.add("GetRandom", "µs", statistics.median(found[plain]))
        report.add("GetRandom where faults can be made", "µs", statistics.median(found[relayed]))
        report.add("GetRandom where the last ones are kept", "µs", statistics.median(found[traced]))


def main() -> None:
    """Measures, and says what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    options = parser.parse_args()
    report = Report("lab", "A TPM for each test")
    report.notes.append(
        "C suite: swtpm is started anew for each test; in the first row swtpm_setup makes its "
        "endorsement keys before, without certificates."
    )
    with tempfile.TemporaryDirectory() as name:
        _measure(report, Path(name))
    _commands_with_a_tpm(report)
    _snapshots(report)
    _commands(report)
    finish(report, options)


if __name__ == "__main__":
    main()
