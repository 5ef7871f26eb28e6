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

_IDENTITIES: Final = ("new", "same")

PROGRAM: Final = Program(
    "vtpm clone",
    "make a TPM like another of the manager's",
    (
        Option(
            "identity",
            "new (the default), or same, with seeds and keys of the other one, which is refused "
            "while that is there",
            metavar="IDENTITY",
            choices=_IDENTITIES,
        ),
        *OPTIONS,
    ),
    usage=("[options] NAME NEW",),
    operands=(NAME, Term("NEW", "what the other one is to be called")),
    description=(
        "Makes a TPM by the same recipe, for the same owner, which is stopped. It has an identity "
        "of its own: its seeds and keys are new, and no key of the other one can be "
        "used with it. To have the same TPM elsewhere, see vtpm_export(8).",
    ),
    examples=(Example("", "vtpm clone web1 web2"),),
    exits=EXITS,
    environment=ENVIRONMENT,
    see_also=("vtpm(8)", "vtpm_create(8)", "vtpm_snapshot(8)"),
)


def main(words: Sequence[str], program: str) -> int:
    """Runs ``vtpm clone`` with the words behind it."""
    return run_command(PROGRAM, words, program, _run)


def _run(line: CommandLine) -> int:
    name, new = operands(line, "the TPM", "what the new one is to be called")
    if (text := line.value("identity") or _IDENTITIES[0]) not in _IDENTITIES:
        raise UsageError(f"'{text}' of --identity is none of {', '.join(_IDENTITIES)}")
    identity: Identity = "same" if text == "same" else "new"
    return tell(line, ask(line, lambda manager: manager.clone(name, new, identity=identity)))
