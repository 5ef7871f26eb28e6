"""``vtpm restore``: gives a TPM the state of a snapshot."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vtpm_cuse.cli.vtpm.fleet.asking import (
    ENVIRONMENT,
    EXITS,
    NAME,
    OPTIONS,
    SNAPSHOT,
    ask,
    operands,
    tell,
)
from vtpm_cuse.cli.words.front import run_command
from vtpm_cuse.cli.words.table import Example, Program

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vtpm_cuse.cli.words.commandline import CommandLine

PROGRAM: Final = Program(
    "vtpm restore",
    "give a TPM of the manager's the state of a snapshot",
    OPTIONS,
    usage=("[options] NAME SNAPSHOT",),
    operands=(NAME, SNAPSHOT),
    description=(
        "The TPM has to be stopped. What it has stored since the snapshot is gone then, as keys "
        "and NV indices; keep that by another snapshot before.",
    ),
    examples=(Example("", "vtpm snapshot web1 now && vtpm restore web1 before-upgrade"),),
    exits=EXITS,
    environment=ENVIRONMENT,
    see_also=("vtpm(8)", "vtpm_snapshot(8)"),
)


def main(words: Sequence[str], program: str) -> int:
    """Runs ``vtpm restore`` with the words behind it."""
    return run_command(PROGRAM, words, program, _run)


def _run(line: CommandLine) -> int:
    name, snapshot = operands(line, "the TPM", "the snapshot")
    return tell(line, ask(line, lambda manager: manager.restore(name, snapshot)))
