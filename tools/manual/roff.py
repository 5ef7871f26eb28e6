"""Text in the man(7) macros: a builder that knows what must be escaped."""

from __future__ import annotations

import re
import textwrap
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

_ESCAPES: Final = {
    "\\": "\\e",
    "-": "\\-",
    "'": "\\(aq",
    "`": "\\(ga",
    "^": "\\(ha",
    "~": "\\(ti",
    '"': "\\(dq",
}
_WIDTH: Final = 78
_SENTENCE_END: Final = re.compile(r"(?<=[.:;]) +(?=[A-Z])")


def escaped(text: str) -> str:
    """Plain text as roff, safe within a line."""
    return "".join(_ESCAPES.get(char, char) for char in text)


def bold(text: str) -> str:
    """Text to be typed as it is."""
    return f"\\fB{escaped(text)}\\fR"


def italic(text: str) -> str:
    """Text to be replaced by a value."""
    return f"\\fI{escaped(text)}\\fR"


class Roff:
    """The source of one page; every method adds to it and takes plain text, if not said otherwise.

    Args:
        name: Of the page.
        section: Of the manual.
        summary: For the NAME section.
        date: As in 2026-01-31.
        source: What the page belongs to.
    """

    def __init__(self, name: str, section: int, summary: str, date: str, source: str) -> None:
        self._lines = [
            '.\\" Made by "python -m tools.manual": change the tables, not this file.',
            f'.TH {name.upper()} {section} {date} "{source}" "{source.partition(" ")[0]}"',
        ]
        self.heading("NAME")
        self._lines += textwrap.wrap(
            f"{escaped(name)} \\- {escaped(summary)}", _WIDTH, break_on_hyphens=False
        )

    def __str__(self) -> str:
        return "\n".join(self._lines) + "\n"

    def heading(self, text: str) -> None:
        """Starts a section."""
        self._lines.append(f".SH {escaped(text)}")

    def subheading(self, text: str) -> None:
        """Starts a part of a section."""
        self._lines.append(f".SS {escaped(text)}")

    def paragraphs(self, texts: Iterable[str]) -> None:
        """Paragraphs of sentences."""
        for row, text in enumerate(texts):
            if row:
                self._lines.append(".PP")
            self.text(text)

    def text(self, text: str) -> None:
        """Sentences, each on a line of its own as roff likes it."""
        for sentence in _SENTENCE_END.split(text):
            for line in textwrap.wrap(
                escaped(sentence), _WIDTH, break_long_words=False, break_on_hyphens=False
            ):
                self.raw(line)

    def raw(self, line: str) -> None:
        """A line of roff."""
        self._lines.append(f"\\&{line}" if line[:1] in {".", "'"} else line)

    def term(self, tag: str, text: str) -> None:
        """A term and what it means; *tag* is roff."""
        self._lines += [".TP", tag]
        self.text(text)

    def indent(self) -> None:
        """What follows belongs to the term before it, until `dedent`."""
        self._lines.append(".RS")

    def dedent(self) -> None:
        """Ends `indent`."""
        self._lines.append(".RE")

    def literal(self, text: str) -> None:
        """Lines as they are, indented."""
        self._lines += [".RS 4", ".nf"]
        for line in text.splitlines():
            self.raw(escaped(line))
        self._lines += [".fi", ".RE"]

    def line_break(self) -> None:
        """Ends a line."""
        self._lines.append(".br")

    def request(self, line: str) -> None:
        """A request of the macros, with its arguments escaped."""
        self._lines.append(line)

    def paragraph(self) -> None:
        """Ends a paragraph."""
        self._lines.append(".PP")
