"""Help screens, 80 columns wide, from a program's table."""

from __future__ import annotations

import textwrap
from itertools import groupby
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from vtpm_cuse.cli.words.table import Example, Option, Program

_WIDTH: Final = 79
_SUB_COLUMN: Final = 30  # of what is said about a sub-option
_OPTION_COLUMN: Final = 24  # of what is said about an option or operand


def help_text(program: Program, name: str = "") -> str:
    """The help screen; *name* is how the program was called, if by another name."""
    return "\n".join(_lines(program, name or program.name)) + "\n"


def _lines(program: Program, name: str) -> Iterator[str]:
    if program.banner:
        yield from (program.banner, "")
    for row, usage in enumerate(program.usage):
        yield f"{'       ' if row else 'Usage: '}{name} {usage}".rstrip()
    if not program.banner:
        yield from ("", *_wrapped(f"{program.summary[:1].upper()}{program.summary[1:]}.", "", ""))
    terms = [*program.operands, *((sub.name, sub.help) for sub in program.subcommands)]
    if terms:
        yield ""
        for term, text in terms:
            yield from _columns(f"  {term}", text, _OPTION_COLUMN)
    for group, options in groupby(program.available, lambda option: option.group):
        yield from ("", f"{group}:")
        yield from (line for option in options for line in _option_lines(option))
    if program.examples:
        yield from ("", "Examples:", *_example_lines(program.examples))


def _option_lines(option: Option) -> Iterator[str]:
    form = f"  {', '.join(option.words)} {option.value_form}".rstrip()
    yield from _columns(form, option.help, _OPTION_COLUMN)
    for sub in option.subs:
        if sub.available:
            form = f"{sub.name}={sub.metavar}" if sub.metavar else sub.name
            yield from _columns(f"      {form}", sub.help, _SUB_COLUMN)


def _example_lines(examples: Iterable[Example]) -> Iterator[str]:
    for what, commands in examples:
        if what:
            yield f"  {what}:"
        yield from textwrap.indent(commands, "    " if what else "  ").splitlines()


def _columns(first: str, text: str, column: int) -> list[str]:
    margin = " " * column
    if len(first) + 2 > column:
        return [first, *_wrapped(text, margin, margin)]
    return _wrapped(text, first.ljust(column), margin)


def _wrapped(text: str, first: str, rest: str) -> list[str]:
    # Words with hyphens, options for one, are to be copied from here in one piece.
    return textwrap.wrap(
        text, _WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False
    )
