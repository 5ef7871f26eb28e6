"""``vtpm clone``: makes a TPM like another of the manager's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vtpm_cuse.cli.vtpm.fleet.asking import ENVIRONMENT, EXITS, NAME, OPTIONS, change
from vtpm_cuse.cli.words.table import Example, Program, Term

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vtpm_cuse.client.manager import Manager
    from vtpm_cuse.wire.manager import Tpm

PROGRAM: Final = Program(
    "vtpm clone",
    "make a TPM like another of the manager's",
    OPTIONS,
    usage=("[options] NAME NEW",),
    operands=(NAME, Term("NEW", "what the other one is to be called")),
    description=(
        "Makes a TPM by the same recipe, for the same owner, which is stopped. It has an identity "
        "of its own: its seeds and keys are new, and no key of the other one can be "
        "used with it.",
    ),
    examples=(Example("", "vtpm clone web1 web2"),),
    exits=EXITS,
    environment=ENVIRONMENT,
    see_also=("vtpm(8)", "vtpm_create(8)", "vtpm_snapshot(8)"),
)


def main(words: Sequence[str], program: str) -> int:
    """Runs ``vtpm clone`` with the words behind it."""
    new = "what the new one is to be called"
    return change(PROGRAM, words, program, _clone, "the TPM", new)


def _clone(manager: Manager, name: str, new: str) -> Tpm:
    return manager.clone(name, new)
