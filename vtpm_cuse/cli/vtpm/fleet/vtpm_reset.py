"""``vtpm reset``: switches a TPM off and on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vtpm_cuse.cli.vtpm.fleet.asking import ENVIRONMENT, EXITS, NAME, OPTIONS, change
from vtpm_cuse.cli.words.table import Example, Program

if TYPE_CHECKING:
    from collections.abc import Sequence

PROGRAM: Final = Program(
    "vtpm reset",
    "switch a TPM of the manager's off and on",
    OPTIONS,
    usage=("[options] NAME",),
    operands=(NAME,),
    description=(
        "As a reset of its platform does: PCRs are as at its start, and what was loaded is gone. It is what brings a TPM back that has failed, which nobody else does: the platform whose measurements were in it has to start anew, too.",
    ),
    examples=(Example("", "vtpm reset web1"),),
    exits=EXITS,
    environment=ENVIRONMENT,
    see_also=(
        "vtpm(8)",
        "vtpm_show(8)",
    ),
)


def main(words: Sequence[str], program: str) -> int:
    """Runs ``vtpm reset`` with the words behind it."""
    return change(PROGRAM, words, program, lambda manager, name: manager.reset(name))
