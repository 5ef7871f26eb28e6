"""What every benchmark gives: rows of figures, beside the C suite's where it has some.

A benchmark measures, makes a `Report` and calls `finish`: a Markdown table for people, or with
``--json`` one JSON object, which is all that bench/all.py wants of it.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse


@dataclass(frozen=True)
class Row:
    """One quantity.

    Attributes:
        what: Its name, alone in its report.
        unit: "µs", "ms", "MiB", "1/s": smaller is better, but for those that end in "/s".
        ours: Our figure.
        peer: The C suite's, measured in the same run; None where it cannot do it.
        limit: The highest ratio ours/peer that is good enough; without a peer the highest figure.
    """

    what: str
    unit: str
    ours: float
    peer: float | None = None
    limit: float | None = None

    @property
    def ratio(self) -> float | None:
        """Ours divided by the peer's."""
        return self.ours / self.peer if self.peer else None

    @property
    def missed(self) -> bool:
        """Whether the limit is exceeded."""
        figure = self.ours if self.peer is None else self.ratio
        return self.limit is not None and (figure is None or figure > self.limit)


@dataclass
class Report:
    """What one benchmark found: *name* as its file's, *title* as a headline."""

    name: str
    title: str
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(
        self,
        what: str,
        unit: str,
        ours: float,
        peer: float | None = None,
        limit: float | None = None,
    ) -> None:
        """Adds a row."""
        self.rows.append(Row(what, unit, ours, peer, limit))

    def without_limits(self) -> Report:
        """What others are shown: limits are targets of ours, and say nothing of the figures."""
        return replace(self, rows=[replace(row, limit=None) for row in self.rows])

    # Any: JSON.
    def as_json(self) -> dict[str, Any]:
        """The report as an object; `read` is the way back."""
        rows = [{**asdict(row), "ratio": row.ratio, "missed": row.missed} for row in self.rows]
        for row in rows:
            if row["limit"] is None:
                del row["limit"], row["missed"]
        return {
            "name": self.name,
            "title": self.title,
            "machine": machine(),
            "rows": rows,
            "notes": self.notes,
        }

    def markdown(self) -> str:
        """A table with a headline."""
        lines = [f"### {self.title}", ""]
        lines += ["| what | unit | vtpm-cuse | C suite | ratio |", "|---|---|---:|---:|---:|"]
        for row in self.rows:
            ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
            bad = " (limit missed)" if row.missed else ""
            lines.append(
                f"| {row.what} | {row.unit} | {_figure(row.ours)} | {_figure(row.peer)} "
                f"| {ratio}{bad} |"
            )
        lines += [f"\n{note}" for note in self.notes]
        return "\n".join(lines) + "\n"


# Any: JSON.
def read(text: str) -> Report:
    """A report from its JSON. Raises ValueError, KeyError or TypeError."""
    found: dict[str, Any] = json.loads(text)
    rows = [
        Row(row["what"], row["unit"], row["ours"], row["peer"], row.get("limit"))
        for row in found["rows"]
    ]
    return Report(found["name"], found["title"], rows, found["notes"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that all benchmarks have."""
    parser.add_argument("--json", action="store_true", help="print one JSON object and no table")
    parser.add_argument("--check", action="store_true", help="fail when a limit is missed")


def finish(report: Report, options: argparse.Namespace) -> None:
    """Prints the report; ends with status 1 if that was asked for and a limit was missed."""
    print(json.dumps(report.as_json()) if options.json else report.markdown(), flush=True)
    missed = [row for row in report.rows if row.missed]
    for row in missed:
        print(f"bench: {row.what}: limit {row.limit} missed", file=sys.stderr)
    if missed and options.check:
        sys.exit(1)


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "processor": f"{len(os.sched_getaffinity(0))} x {models[0] if models else 'unknown'}",
        # Without what its maker puts behind, which says nothing to others.
        "kernel": ".".join(platform.release().split(".")[:2]),
        "python": platform.python_version(),
        "peer": _version_of("swtpm"),
    }


def _version_of(package: str) -> str:
    if not shutil.which("dpkg-query"):
        return ""
    run = subprocess.run(
        ["dpkg-query", "-W", "-f", "${Package} ${Version}", package],
        check=False,
        capture_output=True,
        text=True,
    )
    return run.stdout


def _figure(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
