"""./setup bootstraps; what else there is to do is Python's, beside the package and not in it."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[2]
MODULES: Final = sorted((ROOT / "vtpm_cuse").rglob("*.py"))


def test_setup_stays_short() -> None:
    assert len((ROOT / "setup").read_text().splitlines()) <= 230


def test_each_package_has_a_group_and_a_reason() -> None:
    rows = (ROOT / "tools/packages").read_text().splitlines()
    for row in rows:
        if not row.startswith("#"):
            group, _, reason = row.split(maxsplit=2)
            assert group in {"install", "lab", "tools", "test"}
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
