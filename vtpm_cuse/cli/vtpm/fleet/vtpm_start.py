"""``vtpm start``: switches a TPM on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vtpm_cuse.cli.vtpm.fleet.asking import ENVIRONMENT, EXITS, NAME, OPTIONS, change
from vtpm_cuse.cli.words.table import Example, Program

if TYPE_CHECKING:
    from collections.abc import Sequence

PROGRAM: Final = Program(
    "vtpm start",
    "switch a TPM of the manager's on",
    OPTIONS,
    usage=("[options] NAME",),
    operands=(NAME,),
    description=(
        "Its sockets are there from then on, and say in vtpm show where; it gets a process with the first command that comes, as one that is asleep.",
    ),
    examples=(
        Example("", "vtpm start web1"),
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
    return change(PROGRAM, words, program, lambda manager, name: manager.start(name))
