"""Help screens, 80 columns wide, from the option table."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Final

from vtpm_cuse.cli.options import options_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vtpm_cuse.cli.options import Interface, Option

_WIDTH: Final = 79
_COLUMN: Final = 32  # of what is said about a sub-option


def help_text(interface: Interface, program: str, examples: str) -> str:
    """The help screen of one interface: usage, options, then *examples*."""
    options = (option for option in options_of(interface).values() if option.available)
    return "\n".join(
        (
            f"Usage: {program} [options]\n\nOptions:",
            *(line for option in options for line in _option_lines(option)),
            "\nExamples:",
            textwrap.indent(examples, "  "),
        )
    )


def _option_lines(option: Option) -> Iterator[str]:
    letter = f"-{option.letter}, " if option.letter else ""
    value = " KEY[=VALUE],..." if option.subs else f" {option.metavar}"
    yield f"  {letter}--{option.name}{value}".rstrip()
    yield from _wrapped(option.help, "      ", "      ")
    for sub in option.subs:
        if sub.available:
            form = f"{sub.name}={sub.metavar}" if sub.metavar else sub.name
            yield from _wrapped(sub.help, f"        {form}  ".ljust(_COLUMN), " " * _COLUMN)


def _wrapped(text: str, first: str, rest: str) -> list[str]:
    # Words with hyphens, options for one, are to be copied from here in one piece.
    return textwrap.wrap(
        text, _WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False
    )
