"""``vtpm metrics``: what the TPMs of the manager do, for monitoring."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vtpm_cuse.cli.vtpm.fleet.asking import ENVIRONMENT, HELP, SOCKET, ask
from vtpm_cuse.cli.words.front import run_command
from vtpm_cuse.cli.words.table import Example, Program, Term

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vtpm_cuse.cli.words.commandline import CommandLine

PROGRAM: Final = Program(
    "vtpm metrics",
    "figures about the TPMs of the manager",
    (SOCKET, HELP),
    usage=("[options]",),
    description=(
        "Prints in the text format OpenMetrics what vtpm ls prints for people: how many TPMs are "
        "in each state, and for each of the user's TPMs its state, and how many commands, wakes, "
        "sleeps and failures it has had since the manager has started.",
        "The manager itself tells the same of all TPMs, and how long wakes took, on the Unix socket "
        "metrics beside its own, by HTTP, and with --metrics-file in a file.",
    ),
    examples=(
        Example("", "vtpm metrics"),
        Example(
            "From the manager", "sudo curl --unix-socket /run/vtpm/metrics http://localhost/metrics"
        ),
    ),
    exits=(Term("0", "They were printed."), Term("1", "No manager answers.")),
    environment=ENVIRONMENT,
    see_also=("vtpm(8)", "vtpm_ls(8)", "vtpmd(8)"),
)


def main(words: Sequence[str], program: str) -> int:
    """Runs ``vtpm metrics`` with the words behind it."""
    return run_command(PROGRAM, words, program, _run)


def _run(line: CommandLine) -> int:
    from vtpm_cuse.wire import metrics

    print(metrics.text(ask(line, lambda manager: manager.list())), end="")
    return 0
