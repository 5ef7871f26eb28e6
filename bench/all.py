"""All benchmarks in one run: tables in Markdown and JSON, and pictures of the ratios.

./setup bench [--keep] [NAME...]

Those that need the kernel lab run in it. What is written goes to .cache/bench, and with --keep to
docs/benchmarks and into the README as well.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import bench
from bench.report import Report, machine, read

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

ROOT: Final = Path(__file__).resolve().parent.parent
OUT: Final = ROOT / ".cache/bench"
KEPT: Final = ROOT / "docs/benchmarks"
LAB_SECONDS: Final = 1200
NATIVE_SECONDS: Final = 1200
BEGIN: Final = "<!-- bench: made by ./setup bench --keep -->"
END: Final = "<!-- end of bench -->"
HEADLINES: Final = (
    ("sockets", "GetRandom, one CPU, p50", "Unix socket: GetRandom, one CPU"),
    ("sockets", "GetRandom, two CPUs, p50", "Unix socket: GetRandom, two CPUs"),
    ("proxy", "GetRandom, /dev/tpmrm0, p50", "/dev/tpmrm0 of the kernel: GetRandom"),
    ("state", "NV_Write, directory, not flushed", "NV_Write, neither side flushes"),
    ("state", "NV_Write, linear file (default)", "NV_Write, one file, ours survives a torn write"),
    ("setup", "TPM 2.0, keys and certificates", "swtpm_setup: keys and certificates"),
    ("sockets", "exec to first answer, median", "Start to first answer"),
    ("sockets", "memory, Pss", "Memory of one TPM, Pss"),
)
"""What the README shows, good and bad: report, row, and its name there."""


def names() -> list[str]:
    """Every benchmark: each program here that gives a report; the soak test does not."""
    found = {module.name for module in pkgutil.iter_modules(bench.__path__)} - {"all", "report"}
    return sorted(n for n in found if hasattr(importlib.import_module(f"bench.{n}"), "finish"))


def command_of(name: str) -> list[str]:
    """How a benchmark is run; one with ``IN_LAB = True`` in the kernel lab."""
    command = [sys.executable, str(ROOT / f"bench/{name}.py"), "--json"]
    if getattr(importlib.import_module(f"bench.{name}"), "IN_LAB", False):
        lab = [str(ROOT / "kernel-helpers/lab"), "--quiet", "--timeout", str(LAB_SECONDS)]
        return [*lab, "--", *command]
    return command


def run(name: str) -> Report | None:
    """One benchmark; None, with the reason on standard error, if it failed."""
    say(f"{name} ...")
    begun = time.monotonic()
    try:
        done = subprocess.run(
            command_of(name),
            check=False,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            timeout=NATIVE_SECONDS + LAB_SECONDS,
        )
        report = read(done.stdout) if done.returncode == 0 else None
    except (subprocess.TimeoutExpired, ValueError, KeyError, TypeError) as exc:
        say(f"{name}: {exc}")
        return None
    took = f"{time.monotonic() - begun:.0f} s"
    say(f"{name}: failed after {took}" if report is None else f"{name}: done in {took}")
    return report


def say(message: str) -> None:
    """Progress."""
    print(f"bench: {message}", file=sys.stderr, flush=True)


def markdown(reports: Iterable[Report], facts: dict[str, str], day: str) -> str:
    """The whole table."""
    tables = "\n".join(report.markdown() for report in reports)
    return (
        f"# Benchmarks\n\n{_where(facts, day)}\n\nSmaller is better, but for units that end in "
        f'"/s". The ratio is ours divided by the C suite\'s, measured in the same run.\n\n'
        f"![ratios](ratios.png)\n\n{tables}"
    )


def summary(reports: Iterable[Report], facts: dict[str, str], day: str) -> str:
    """The part for the README."""
    table = headlines(reports).markdown().splitlines()[2:]
    picture = "![ratios](docs/benchmarks/headlines.png)"
    rest = "All of it: [docs/benchmarks](docs/benchmarks/README.md)."
    return "\n".join([BEGIN, *table, "", picture, "", _where(facts, day), rest, END])


def headlines(reports: Iterable[Report]) -> Report:
    """The `HEADLINES` as a report of its own, without limits."""
    rows = {(report.name, row.what): row for report in reports for row in report.rows}
    found = Report("README", "How fast it is")
    for report, what, name in HEADLINES:
        if row := rows.get((report, what)):
            found.add(name, row.unit, row.ours, row.peer)
    return found


def _where(facts: dict[str, str], day: str) -> str:
    peer = f", beside {facts['peer']}" if facts["peer"] else ""
    return (
        f"Measured on {day}: {facts['processor']}, kernel {facts['kernel']}, "
        f"Python {facts['python']}{peer}."
    )


def into_readme(text: str, part: str) -> str:
    """The README with its part about benchmarks replaced. Raises ValueError without the marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the README lacks the lines {BEGIN!r} and {END!r}")
    return before + part + after


def plot(reports: Iterable[Report], path: Path) -> None:
    """Bars of the ratios, on a logarithmic scale: left of 1 is faster or smaller than the peer."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FixedLocator, FuncFormatter

    rows = list(_ratios(reports))
    if not rows:
        return
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.26 * len(rows)), layout="constrained")
    labels, ratios = zip(*reversed(rows), strict=True)
    colours = ["#2a7f62" if ratio <= 1 else "#b5651d" for ratio in ratios]
    bars = axes.barh(labels, [ratio - 1 for ratio in ratios], left=1, color=colours)
    axes.bar_label(bars, [f"{ratio:.2f}" for ratio in ratios], padding=3, fontsize=7)
    axes.set_xscale("log")
    axes.margins(y=0.01)
    low, high = min(*ratios, 0.5), max(*ratios, 2)
    axes.set_xlim(low / 1.5, high * 1.5)
    ticks = [t for t in (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100) if low / 1.5 <= t <= high * 1.5]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(FixedLocator([]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.axvline(1, color="black", linewidth=0.8)
    axes.tick_params(axis="y", labelsize=7)
    axes.set_xlabel("vtpm-cuse divided by the C suite: left of 1 is better")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _ratios(reports: Iterable[Report]) -> Iterator[tuple[str, float]]:
    for report in reports:
        for row in report.rows:
            if row.ratio:
                ratio = 1 / row.ratio if row.unit.endswith("/s") else row.ratio
                yield row.what if report.name == "README" else f"{report.name}: {row.what}", ratio


def write(folder: Path, reports: list[Report], facts: dict[str, str], day: str) -> None:
    """Writes the files of one run."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {"day": day, "machine": facts, "reports": [report.as_json() for report in reports]}
    (folder / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / "README.md").write_text(markdown(reports, facts, day))
    plot(reports, folder / "ratios.png")
    plot([headlines(reports)], folder / "headlines.png")


def main() -> int:
    """Runs what was asked for; returns 1 if one of them failed."""
    parser = argparse.ArgumentParser(
        prog="./setup bench", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("--keep", action="store_true", help="write docs/benchmarks and the README")
    parser.add_argument("--list", action="store_true", help="say which there are, and end")
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these, by default all")
    options = parser.parse_args()
    if options.list:
        print(*names(), sep="\n")
        return 0
    unknown = set(options.names) - set(names())
    if unknown:
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(names())}")
    if options.keep and options.names:
        parser.error("--keep is for a run of all of them")
    wanted = options.names or names()
    reports = [report for report in map(run, wanted) if report is not None]
    facts, day = machine(), time.strftime("%Y-%m-%d")
    write(OUT, reports, facts, day)
    say(f"written: {OUT}/README.md, results.json, ratios.png and headlines.png")
    if len(reports) < len(wanted):
        return 1
    if options.keep:
        write(KEPT, [report.without_limits() for report in reports], facts, day)
        readme = ROOT / "README.md"
        readme.write_text(into_readme(readme.read_text(), summary(reports, facts, day)))
        say(f"kept: {KEPT} and {readme}")
    print((OUT / "README.md").read_text())
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
