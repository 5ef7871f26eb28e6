"""``vtpm logs``: what has happened to a TPM."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from vtpm_cuse.cli.vtpm.fleet.asking import (
    ENVIRONMENT,
    EXITS,
    HELP,
    NAME,
    SOCKET,
    as_json,
    ask,
    operands,
)
from vtpm_cuse.cli.words.front import run_command
from vtpm_cuse.cli.words.table import Example, Option, Program
from vtpm_cuse.errors import shown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vtpm_cuse.cli.words.commandline import CommandLine

PROGRAM: Final = Program(
    "vtpm logs",
    "what has happened to a TPM of the manager's",
    (SOCKET, Option("json", "print an array of objects"), HELP),
    usage=("[options] NAME",),
    operands=(NAME,),
    description=(
        "Prints when it was made, started, stopped and copied, and why it has failed, the newest "
        "last: what the manager remembers since its own start, 50 lines at most. That it sleeps or "
        "wakes is not in it; vtpm watch shows that. What its process has complained of is in the "
        "manager's log.",
    ),
    examples=(Example("", "vtpm logs web1"),),
    exits=EXITS,
    environment=ENVIRONMENT,
    see_also=("vtpm(8)", "vtpm_show(8)", "vtpm_watch(8)"),
)


def main(words: Sequence[str], program: str) -> int:
    """Runs ``vtpm logs`` with the words behind it."""
    return run_command(PROGRAM, words, program, _run)


def _run(line: CommandLine) -> int:
    (name,) = operands(line, "one TPM")
    notes = ask(line, lambda manager: manager.logs(name))
    if line.has("json"):
        print(f"[{', '.join(map(as_json, notes))}]")
        return 0
    for note in notes:
        when = time.strftime("%F %T", time.localtime(note.time))
        print(f"{when} {shown(note.text)}")
    return 0
