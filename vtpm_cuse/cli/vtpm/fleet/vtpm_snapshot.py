"""``vtpm snapshot``: keeps a copy of a TPM's state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vtpm_cuse.cli.vtpm.fleet.asking import ENVIRONMENT, EXITS, NAME, OPTIONS, SNAPSHOT, change
from vtpm_cuse.cli.words.table import Example, Program

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vtpm_cuse.client.manager import Manager
    from vtpm_cuse.wire.manager import Tpm

PROGRAM: Final = Program(
    "vtpm snapshot",
    "keep a copy of the state of a TPM of the manager's",
    OPTIONS,
    usage=("[options] NAME SNAPSHOT",),
    operands=(NAME, SNAPSHOT),
    description=(
        "The TPM has to be stopped. The copy has all that survives its being off, keys and NV "
        "indices, and is as secret as the TPM; vtpm restore gives it back.",
    ),
    examples=(Example("", "vtpm stop web1 && vtpm snapshot web1 before-upgrade"),),
    exits=EXITS,
    environment=ENVIRONMENT,
    see_also=("vtpm(8)", "vtpm_restore(8)", "vtpm_clone(8)"),
)


def main(words: Sequence[str], program: str) -> int:
    """Runs ``vtpm snapshot`` with the words behind it."""
    return change(PROGRAM, words, program, _snapshot, "the TPM", "the snapshot")


def _snapshot(manager: Manager, name: str, snapshot: str) -> Tpm:
    manager.snapshot(name, snapshot)
    return manager.describe(name)
