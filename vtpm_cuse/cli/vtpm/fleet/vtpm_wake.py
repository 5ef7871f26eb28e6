"""``vtpm wake``: wakes a TPM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vtpm_cuse.cli.vtpm.fleet.asking import ENVIRONMENT, EXITS, NAME, OPTIONS, change
from vtpm_cuse.cli.words.table import Example, Program

if TYPE_CHECKING:
    from collections.abc import Sequence

PROGRAM: Final = Program(
    "vtpm wake",
    "wake a TPM of the manager's",
    OPTIONS,
    usage=("[options] NAME",),
    operands=(NAME,),
    description=(
        "The first command does that, too; this is for who wants that one to be answered at once.",
    ),
    examples=(Example("", "vtpm wake web1"),),
    exits=EXITS,
    environment=ENVIRONMENT,
    see_also=(
        "vtpm(8)",
        "vtpm_hibernate(8)",
    ),
)


def main(words: Sequence[str], program: str) -> int:
    """Runs ``vtpm wake`` with the words behind it."""
    return change(PROGRAM, words, program, lambda manager, name: manager.wake(name))
