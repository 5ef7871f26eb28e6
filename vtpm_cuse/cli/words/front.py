"""A program whose first word chooses another, as ``swtpm`` and ``vtpm`` are, and what it chooses."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from vtpm_cuse.cli.words.commandline import CommandLine
from vtpm_cuse.cli.words.help import help_text
from vtpm_cuse.cli.words.program import complain, run_program

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

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


def run_command(
    table: Program,
    words: Sequence[str],
    name: str,
    work: Callable[[CommandLine], int],
    *,
    clears_up: bool = True,
) -> int:
    """Runs what was chosen, but for its help screen.

    Args:
        table: Its table.
        words: What follows its name.
        name: How it was called, which begins its complaints.
        work: Is given its command line; returns the exit status.
        clears_up: As `program.run_program` has it.

    Returns:
        The exit status.
    """

    def run() -> int:
        line = CommandLine(table, words, name)
        if not line.has("help"):
            return work(line)
        print(help_text(table, name), end="")
        return 0

    return run_program(run, lambda text: complain(f"{name}: {text}"), clears_up=clears_up)
