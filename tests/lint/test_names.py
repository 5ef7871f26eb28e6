"""Modules that a docstring names are there."""

from __future__ import annotations

import ast
import re
import sys
from functools import cache
from pathlib import Path
from typing import Final

import pytest

PACKAGE: Final = Path(__file__).parents[2] / "vtpm_cuse"
MODULES: Final = sorted(PACKAGE.rglob("*.py"))
DOTTED: Final = re.compile(r"`([a-z_]\w*(?:\.\w+)+)(?:\(\))?`")
"""A module, or what is in one; a class or a method begins with the name of a class."""
FILES: Final = re.compile(r".*\.(?:cert|conf)")


@cache
def names_in(module: Path) -> frozenset[str]:
    """What a module defines at its top."""
    found = set()
    for node in ast.parse(module.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return frozenset(found)


def is_there(name: str, folder: Path) -> bool:
    """Whether *name* is a module, or in one, of the package, of *folder*, or of Python's own."""
    first, _, rest = name.removeprefix("vtpm_cuse.").partition(".")
    if (folder / first).is_dir():
        return is_there(rest, folder / first) if rest else True
    module = folder / f"{first}.py"
    return module.exists() and (not rest or rest.partition(".")[0] in names_in(module))


def missing(path: Path, text: str) -> list[str]:
    """What docstrings in *text*, the module's at *path*, name and nobody has written."""
    return [
        name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for name in DOTTED.findall(str(node.value.value))
        if not FILES.fullmatch(name) and name.partition(".")[0] not in sys.stdlib_module_names
        if not is_there(name, PACKAGE) and not is_there(name, path.parent)
    ]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_module_that_a_docstring_names_is_there(path: Path) -> None:
    assert missing(path, path.read_text(encoding="utf-8")) == []


def test_a_name_that_nobody_has_is_found() -> None:
    text = '"""`device.ptm`, `vtpm.ptm.no_such`, `vtpm.ptm`, `custody.Whose`, `struct.Struct`."""'
    assert missing(PACKAGE / "vtpm/vtpm.py", text) == ["device.ptm", "vtpm.ptm.no_such"]
