"""A program whose first word chooses another: what ``swtpm`` and ``vtpm`` have in common."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from vtpm_cuse.cli.words.help import help_text
from vtpm_cuse.cli.words.program import complain

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vtpm_cuse.cli.words.table import Program


def run_chosen(
    program: Program, words: Sequence[str], version: str, *, missing: str, unknown: str
) -> int:
    """Runs the subcommand that the first word names, with the words behind it.

    Args:
        program: Its table; only the module of what is chosen is imported.
        words: What follows the program's name.
        version: The line that ``--version`` prints.
        missing: The complaint where there is no word.
        unknown: That about another one, which stands for ``{}``.

    Returns:
        The exit status.
    """
    first = words[0] if words else None
    if first in {"-v", "--version"}:
        print(version)
        return 0
    if first in {"-h", "--help"}:
        print(help_text(program), end="")
        return 0
    for name, _, module in program.subcommands:
        if name == first:
            status: int = import_module(module).main(words[1:], f"{program.name} {name}")
            return status
    reason = missing if first is None else unknown.format(first)
    complain(f"{reason}\n{help_text(program)}".rstrip())
    return 1
