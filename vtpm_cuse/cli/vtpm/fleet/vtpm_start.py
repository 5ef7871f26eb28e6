"""``vtpm start``: switches a TPM on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vtpm_cuse.cli.vtpm.fleet.asking import (
    ENVIRONMENT,
    EXITS,
    GIVEN_KEY_OPTION,
    NAME,
    OPTIONS,
    ask,
    key_of,
    operands,
    tell,
)
from vtpm_cuse.cli.words.front import run_command
from vtpm_cuse.cli.words.table import Example, Program

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vtpm_cuse.cli.words.commandline import CommandLine

PROGRAM: Final = Program(
    "vtpm start",
    "switch a TPM of the manager's on",
    (GIVEN_KEY_OPTION, *OPTIONS),
    usage=("[options] NAME",),
    operands=(NAME,),
    description=(
        "Its sockets are there from then on, and say in vtpm show where; it gets a process with the first command that comes, as one that is asleep.",
        "The key of one that was created with --key fd, pwdfd or keyring has to be given again.",
    ),
    examples=(
        Example("", "vtpm start web1"),
        Example("With its key", "vtpm start --key fd=3 web1 3<web1.key"),
        Example("Its socket for many clients", "vtpm start --json web1 | jq -r .sockets.managed"),
    ),
    exits=EXITS,
    environment=ENVIRONMENT,
    see_also=(
        "vtpm(8)",
        "vtpm_create(8)",
        "vtpm_stop(8)",
    ),
)


def main(words: Sequence[str], program: str) -> int:
    """Runs ``vtpm start`` with the words behind it."""
    return run_command(PROGRAM, words, program, _run)


def _run(line: CommandLine) -> int:
    (name,), key = operands(line, "one TPM"), key_of(line)
    return tell(line, ask(line, lambda manager: manager.start(name, key=key)))
