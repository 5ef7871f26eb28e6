"""``vtpm hibernate``: puts a TPM to sleep."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vtpm_cuse.cli.vtpm.fleet.asking import ENVIRONMENT, EXITS, NAME, OPTIONS, change
from vtpm_cuse.cli.words.table import Example, Program

if TYPE_CHECKING:
    from collections.abc import Sequence

PROGRAM: Final = Program(
    "vtpm hibernate",
    "put a TPM of the manager's to sleep",
    OPTIONS,
    usage=("[options] NAME",),
    operands=(NAME,),
    description=(
        "It is put to sleep by itself when it has had nothing to do for a while; this is for who wants the memory now. Nothing is lost by it, and the next command wakes it.",
    ),
    examples=(Example("", "vtpm hibernate web1"),),
    exits=EXITS,
    environment=ENVIRONMENT,
    see_also=(
        "vtpm(8)",
        "vtpm_wake(8)",
    ),
)


def main(words: Sequence[str], program: str) -> int:
    """Runs ``vtpm hibernate`` with the words behind it."""
    return change(PROGRAM, words, program, lambda manager, name: manager.hibernate(name))
