"""What the documents claim has tests, which they name, and which are there."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import Final

import pytest

from tests.support.attacks import STILL

ROOT: Final = Path(__file__).parents[2]
TESTS: Final = ROOT / "tests"
PAPERS: Final = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "docs/handbook").glob("*.md")]
)
NAMED: Final = re.compile(r"([\w/]+\.py)::(\w+)")
"""A test, by its file below tests/ and its name."""

SECURITY: Final = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
README: Final = (ROOT / "README.md").read_text(encoding="utf-8")


@cache
def names_in(path: Path) -> frozenset[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    return frozenset(node.name for node in functions)


def missing(text: str) -> list[str]:
    """Tests that *text* names and nobody has written."""
    return [
        f"{file}::{name}"
        for file, name in NAMED.findall(text)
        if not (TESTS / file).is_file() or name not in names_in(TESTS / file)
    ]


def claims(text: str) -> list[str]:
    """Items of lists, and rows of tables without their headings."""
    found: list[str] = []
    for line in text.splitlines():
        if line.startswith("- "):
            found.append(line)
        elif line.startswith("  ") and found and found[-1].startswith("- "):
            found[-1] += line
        elif line.startswith("|---"):
            found.pop()
        elif line.startswith("|"):
            found.append(line)
    return found


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.name)
def test_every_test_that_is_named_is_there(path: Path) -> None:
    assert missing(path.read_text(encoding="utf-8")) == []


def test_a_name_that_nobody_has_is_found() -> None:
    assert missing("`lint/test_papers.py::test_of_nothing`, `lint/test_no.py::test_x`") == [
        "lint/test_papers.py::test_of_nothing",
        "lint/test_no.py::test_x",
    ]


def test_every_claim_of_security_has_a_test_beside_it() -> None:
    without = [claim for claim in claims(SECURITY) if not NAMED.search(claim)]
    assert without == []
    assert len(claims(SECURITY)) > 20


def test_every_section_of_the_readme_that_claims_something_names_tests() -> None:
    """In comments, which no reader has to see."""
    sections = re.split(r"^## ", README, flags=re.MULTILINE)
    exempt = ("How fast it is", "Work on it", "Dependencies")
    assert [s[:30] for s in sections if not s.startswith(exempt) and not NAMED.search(s)] == []


def test_what_a_subverted_process_still_can_is_listed_as_it_is_tried() -> None:
    listed = SECURITY.split("it still\n\n", 1)[1].split("\n\n")[0]
    items = " ".join(listed.split()).rstrip(".").split("; ")
    assert items == list(STILL)


def test_every_difference_has_a_reason_and_one_row() -> None:
    text = (ROOT / "docs" / "differences.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in claims(text)]
    assert [row for row in rows if len(row) not in {4, 5} or not all(row)] == []
    assert sum(len(row) == 5 for row in rows) == len(
        claims(text.split("by one stream", 1)[1].split("\n## ")[0])
    )
    # In two sections, two programs may differ at the same place.
    sections = [claims(section) for section in text.split("\n## ")[1:]]
    places = [[row.split("|")[1] for row in section] for section in sections]
    assert [section for section in places if len(section) != len(set(section))] == []
    assert sum(map(len, places)) == len(rows)


PLACE: Final = re.compile(r"`([\w.-]+/(?:[\w./-]*/)?|(?:[\w-]+/)*[\w-]+\.py)`")
"""A file of Python, or a folder, as the documents name them."""
MAPS: Final = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "docs" / "architecture.md"]


@pytest.mark.parametrize("path", MAPS, ids=lambda path: path.name)
def test_every_place_in_the_tree_that_is_named_is_there(path: Path) -> None:
    """From the top, from the package, or from within a room."""
    rooms = [ROOT, *(place for place in (ROOT / "vtpm_cuse").rglob("*") if place.is_dir())]
    rooms += [ROOT / "vtpm_cuse", TESTS, TESTS / "unit"]
    named = set(PLACE.findall(path.read_text(encoding="utf-8"))) - MADE
    assert {name for name in named if not any((room / name).exists() for room in rooms)} == set()


MADE: Final = {".venv/", "dist/"}


MEMBER: Final = re.compile(r"`(?:\w+\.)*([A-Z]\w+)\.([a-z_]\w*)`")
"""A method or attribute of a class."""


def test_every_member_that_the_architecture_names_is_there() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(MEMBER.findall(text))
    assert len(named) >= 5
    assert named <= {
        (node.name, member)
        for path in (ROOT / "vtpm_cuse").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
        for member in members(node)
    }


def members(node: ast.ClassDef) -> set[str]:
    found = {f.name for f in node.body if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef)}
    annotated = (item for item in node.body if isinstance(item, ast.AnnAssign))
    return found | {item.target.id for item in annotated if isinstance(item.target, ast.Name)}
