"""``vtpm ls``: the TPMs of the manager."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vtpm_cuse.cli.vtpm.fleet.asking import ENVIRONMENT, HELP, SOCKET, as_json, ask
from vtpm_cuse.cli.vtpm.fleet.words import table
from vtpm_cuse.cli.words.front import run_command
from vtpm_cuse.cli.words.table import Example, Option, Program, Term
from vtpm_cuse.errors import shown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vtpm_cuse.cli.words.commandline import CommandLine

PROGRAM: Final = Program(
    "vtpm ls",
    "the TPMs of the manager",
    (
        Option("names", "print their names alone, a line each"),
        SOCKET,
        Option("json", "print an array of objects"),
        HELP,
    ),
    usage=("[options]",),
    description=(
        "Prints a line for each TPM of the user's, and for root and the manager's own user for "
        "each of all: name, state, owner, the process that it has while it is awake, how many "
        "commands it has had and how often it was woken since the manager has started, and how "
        "long ago it was last used.",
    ),
    examples=(
        Example("", "vtpm ls"),
        Example("Each of them", "vtpm ls --names | xargs -rn1 vtpm stop"),
        Example(
            "Those that have failed",
            "vtpm ls --json | jq -r '.[] | select(.state == \"failed\") | .name'",
        ),
    ),
    exits=(Term("0", "They were printed, be there none."), Term("1", "No manager answers.")),
    environment=ENVIRONMENT,
    see_also=("vtpm(8)", "vtpm_show(8)", "vtpm_top(8)"),
)


def main(words: Sequence[str], program: str) -> int:
    """Runs ``vtpm ls`` with the words behind it."""
    return run_command(PROGRAM, words, program, _run)


def _run(line: CommandLine) -> int:
    tpms = ask(line, lambda manager: manager.list())
    if line.has("json"):
        print(f"[{', '.join(map(as_json, tpms))}]")
    elif line.has("names"):
        print("".join(f"{shown(tpm.name)}\n" for tpm in tpms), end="")
    else:
        print(*table(tpms), sep="\n")
    return 0
