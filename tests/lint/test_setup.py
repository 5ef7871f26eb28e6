"""./setup bootstraps; what else there is to do is Python's, beside the package and not in it."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path
from typing import Final

import pytest

from tools.package import day_of_release
from vtpm_cuse import __version__

ROOT: Final = Path(__file__).parents[2]
MODULES: Final = sorted((ROOT / "vtpm_cuse").rglob("*.py"))


def test_setup_stays_short() -> None:
    assert len((ROOT / "setup").read_text().splitlines()) <= 230


def test_each_package_has_a_group_and_a_reason() -> None:
    rows = (ROOT / "tools/packages").read_text().splitlines()
    for row in rows:
        if not row.startswith("#"):
            group, _, reason = row.split(maxsplit=2)
            assert group in {"install", "package", "lab", "tools", "test"}
            assert reason


def test_setup_knows_every_command_that_its_help_names() -> None:
    said = subprocess.run([ROOT / "setup", "help"], capture_output=True, text=True, check=True)
    commands = [
        line.split()[0]
        for line in said.stdout.splitlines()
        if line.startswith("  ") and line[2:3].isalpha()
    ]
    assert {"install", "run", "test", "lab", "deploy", "pin"} <= set(commands)
    text = (ROOT / "setup").read_text()
    for name in commands:
        assert f"\n{name})" in text or f"\n{name} | " in text


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_nothing_in_tools_is_imported_by_the_package(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            assert name.partition(".")[0] not in {"tools", "tests", "bench"}


def test_the_changelog_begins_with_this_version_and_a_day() -> None:
    """Which the packages are of."""
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert day_of_release(changes, __version__).year >= 2026


@pytest.mark.parametrize(
    "heading", ["Unreleased", "0.9.9, 2026-01-02", "1.0", "1.0, 2026-13-02", "1.0, 2026-01-02 x"]
)
def test_nothing_is_packaged_that_the_changelog_does_not_begin_with(heading: str) -> None:
    with pytest.raises(ValueError, match=r"^the first heading of CHANGELOG\.md has to be"):
        day_of_release(f"# Changes\n\n## {heading}\n\n- x\n\n## 1.0, 2026-01-01\n", "1.0")
