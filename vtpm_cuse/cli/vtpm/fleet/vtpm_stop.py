"""``vtpm stop``: shuts a TPM down."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vtpm_cuse.cli.vtpm.fleet.asking import ENVIRONMENT, EXITS, NAME, OPTIONS, change
from vtpm_cuse.cli.words.table import Example, Program

if TYPE_CHECKING:
    from collections.abc import Sequence

PROGRAM: Final = Program(
    "vtpm stop",
    "shut a TPM of the manager's down",
    OPTIONS,
    usage=("[options] NAME",),
    operands=(NAME,),
    description=(
        "As at the end of its platform: the TPM is told of it, so nothing is lost but what a TPM loses when it is off, as PCRs and sessions. Its clients are disconnected.",
    ),
    examples=(Example("", "vtpm stop web1"),),
    exits=EXITS,
    environment=ENVIRONMENT,
    see_also=(
        "vtpm(8)",
        "vtpm_start(8)",
    ),
)


def main(words: Sequence[str], program: str) -> int:
    """Runs ``vtpm stop`` with the words behind it."""
    return change(PROGRAM, words, program, lambda manager, name: manager.stop(name))
