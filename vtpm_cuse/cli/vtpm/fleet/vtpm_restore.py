"""``vtpm restore``: gives a TPM the state of a snapshot."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vtpm_cuse.cli.vtpm.fleet.asking import ENVIRONMENT, EXITS, NAME, OPTIONS, SNAPSHOT, change
from vtpm_cuse.cli.words.table import Example, Program

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vtpm_cuse.client.manager import Manager
    from vtpm_cuse.wire.manager import Tpm

PROGRAM: Final = Program(
    "vtpm restore",
    "give a TPM of the manager's the state of a snapshot",
    OPTIONS,
    usage=("[options] NAME SNAPSHOT",),
    operands=(NAME, SNAPSHOT),
    description=(
        "The TPM has to be stopped. What it has stored since the snapshot is gone then, as keys "
        "and NV indices; keep that by another snapshot before.",
    ),
    examples=(Example("", "vtpm snapshot web1 now && vtpm restore web1 before-upgrade"),),
    exits=EXITS,
    environment=ENVIRONMENT,
    see_also=("vtpm(8)", "vtpm_snapshot(8)"),
)


def main(words: Sequence[str], program: str) -> int:
    """Runs ``vtpm restore`` with the words behind it."""
    return change(PROGRAM, words, program, _restore, "the TPM", "the snapshot")


def _restore(manager: Manager, name: str, snapshot: str) -> Tpm:
    return manager.restore(name, snapshot)
