"""``vtpm rm``: deletes a TPM of the manager's."""

from __future__ import annotations

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

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vtpm_cuse.cli.words.commandline import CommandLine
    from vtpm_cuse.client.manager import Manager
    from vtpm_cuse.wire.manager import Tpm

PROGRAM: Final = Program(
    "vtpm rm",
    "delete a TPM of the manager's, for good",
    (
        Option("force", "even if it is in use"),
        SOCKET,
        Option("json", "print an object, what it was last"),
        HELP,
    ),
    usage=("[options] NAME",),
    operands=(NAME,),
    description=(
        "Deletes it with all its keys and its snapshots: what was sealed by it, as the key of a "
        "disk, can be had by no one any more. Unless --force is given, it has to be stopped.",
    ),
    examples=(Example("", "vtpm stop web1 && vtpm rm web1"),),
    exits=EXITS,
    environment=ENVIRONMENT,
    see_also=("vtpm(8)", "vtpm_stop(8)", "vtpm_snapshot(8)"),
)


def main(words: Sequence[str], program: str) -> int:
    """Runs ``vtpm rm`` with the words behind it."""
    return run_command(PROGRAM, words, program, _run)


def _run(line: CommandLine) -> int:
    (name,) = operands(line, "one TPM")

    def request(manager: Manager) -> Tpm:
        tpm = manager.describe(name)
        manager.remove(name, force=line.has("force"))
        return tpm

    tpm = ask(line, request)
    if line.has("json"):
        print(as_json(tpm))
    return 0
