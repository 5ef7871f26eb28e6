"""``vtpm clone``: makes a TPM like another of the manager's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vtpm_cuse.cli.vtpm.fleet.asking import ENVIRONMENT, EXITS, NAME, OPTIONS, ask, operands, tell
from vtpm_cuse.cli.words.front import run_command
from vtpm_cuse.cli.words.table import Example, Option, Program, Term
from vtpm_cuse.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vtpm_cuse.cli.words.commandline import CommandLine
    from vtpm_cuse.wire.manager import Identity

PROGRAM: Final = Program(
    "vtpm clone",
    "make a TPM like another of the manager's",
    (
        Option(
            "identity",
            "new, by default, or same seeds and keys",
            metavar="WHICH",
            choices=("new", "same"),
        ),
        *OPTIONS,
    ),
    usage=("[options] NAME NEW",),
    operands=(NAME, Term("NEW", "what the other one is to be called")),
    description=(
        "The new one is stopped. With an identity of its own it is made by the same recipe, and no "
        "key of the other one can be used with it. With the same identity it is a copy: both have "
        "the same endorsement key, and whoever asks cannot tell one machine from the other.",
    ),
    examples=(Example("", "vtpm clone web1 web2"),),
    exits=EXITS,
    environment=ENVIRONMENT,
    see_also=("vtpm(8)", "vtpm_create(8)", "vtpm_snapshot(8)"),
)

_IDENTITIES: Final[dict[str, Identity]] = {"new": "new", "same": "same"}


def main(words: Sequence[str], program: str) -> int:
    """Runs ``vtpm clone`` with the words behind it."""
    return run_command(PROGRAM, words, program, _run)


def _run(line: CommandLine) -> int:
    name, new = operands(line, "the TPM", "what the new one is to be called")
    word = line.value("identity") or "new"
    if (identity := _IDENTITIES.get(word)) is None:
        raise UsageError(f"'{word}' is no --identity: it is new or same")
    return tell(line, ask(line, lambda manager: manager.clone(name, new, identity=identity)))
