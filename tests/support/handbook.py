"""The pages of the handbook, and what of them a test types word by word."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final, NamedTuple

_DOCS: Final = Path(__file__).parents[2] / "docs"
PAGES: Final = (*sorted(_DOCS.glob("handbook/*.md")), _DOCS / "containers.md", _DOCS / "manager.md")

_BOX: Final = re.compile(
    r"(?:<!-- (lab|as: ([^>]+)) -->\n)?^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL
)


class Box(NamedTuple):
    """What a reader is to type, or to write into a file."""

    language: str
    text: str
    lab: bool
    tested_as: str
    """The test that does the same, where it cannot be typed in a test; else empty."""


def boxes(page: Path) -> list[Box]:
    """All of *page*, in the order of reading."""
    return [
        Box(language, text, mark == "lab", other or "")
        for mark, other, language, text in _BOX.findall(page.read_text(encoding="utf-8"))
    ]


def script(page: Path, *, lab: bool) -> str:
    """The commands of *page*: those for the kernel lab, or those that any machine can run."""
    return "".join(
        box.text
        for box in boxes(page)
        if box.language == "sh" and box.lab == lab and not box.tested_as
    )


def pages(*, lab: bool) -> list[Path]:
    """Those that have commands for there."""
    return [page for page in PAGES if script(page, lab=lab)]
