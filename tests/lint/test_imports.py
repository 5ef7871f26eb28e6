"""Imports run downwards only, and each layer keeps out what it has no business with."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE: Final = Path(__file__).parents[2] / "vtpm_cuse"
MODULES: Final = sorted(
    path for path in PACKAGE.rglob("*.py") if path.name not in {"_libtpms.py", "_build.py"}
)

# Layer to the layers it may import besides itself. `client` is what swtpm_ioctl stands on, so it
# needs no vTPM; the service asks its own device through it whether it answers.
MAY_IMPORT: Final[dict[str, set[str]]] = {
    "errors": set(),
    "files": set(),
    "wire": {"errors"},
    "faults": {"errors", "wire"},
    "proto": {"errors", "faults", "wire"},
    "storage": {"errors", "faults", "files", "wire"},
    "engine": {"errors", "faults", "wire"},
    "device": {"errors", "faults", "wire", "proto", "storage", "engine"},
    "client": {"errors", "faults", "files", "wire", "proto"},
    "frontends": {"errors", "faults", "files", "wire", "proto", "device"},
    "manufacture": {"errors", "faults", "files", "wire", "engine"},
    "service": {
        *{"errors", "faults", "files", "wire", "proto", "storage", "engine", "device"},
        *{"frontends", "client", "manufacture"},
    },
    "cli": {
        *{"errors", "faults", "files", "wire", "proto", "storage", "engine", "device"},
        *{"frontends", "client", "service", "manufacture"},
    },
    "manual": {"cli", "wire"},
}

# For the device layer, engines and stores are protocols; what is concrete is chosen above it.
CONCRETE: Final = {
    "vtpm_cuse.engine.libtpms",
    "vtpm_cuse.storage.directory",
    "vtpm_cuse.storage.linear",
    "vtpm_cuse.storage.memory",
}
CHOOSES_CONCRETE: Final = {"service", "cli", "storage", "engine"}

SANS_IO: Final = {"errors", "faults", "wire", "proto"}
NO_IO: Final = {
    *{"socket", "select", "selectors", "fcntl", "subprocess", "threading", "queue", "time"},
    *{"asyncio", "trio", "cffi", "pathlib", "io", "shutil", "tempfile", "signal", "logging"},
}


def layer_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def name_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE.parent).with_suffix("")
    return ".".join(part for part in relative.parts if part != "__init__")


def imports_of(path: Path) -> Iterator[tuple[str, int]]:
    """All imports, wherever they are in the file: module and line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: relative import"
            assert node.module is not None
            yield node.module, node.lineno
            if node.module == "vtpm_cuse":
                for alias in node.names:
                    yield f"vtpm_cuse.{alias.name}", node.lineno


@pytest.mark.parametrize("path", MODULES, ids=lambda path: name_of(path))
def test_imports_run_downwards(path: Path) -> None:
    layer = layer_of(name_of(path))
    for module, line in imports_of(path):
        if not module.startswith("vtpm_cuse.") or not layer:
            continue
        target = layer_of(module)
        if target.startswith("__"):  # the version
            continue
        assert target == layer or target in MAY_IMPORT[layer], (
            f"{path}:{line}: {layer} must not import {module}"
        )


def test_every_layer_is_known() -> None:
    assert {layer_of(name_of(path)) for path in MODULES} - {""} <= set(MAY_IMPORT)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: name_of(path))
def test_only_the_service_chooses_engine_and_store(path: Path) -> None:
    if layer_of(name_of(path)) in CHOOSES_CONCRETE:
        return
    used = {module for module, _ in imports_of(path)} & CONCRETE
    assert not used, f"{path} imports {used}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: name_of(path))
def test_sans_io(path: Path) -> None:
    if layer_of(name_of(path)) not in SANS_IO:
        return
    for module, line in imports_of(path):
        assert module.partition(".")[0] not in NO_IO, f"{path}:{line}: {module}"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == "os":
                assert node.attr.isupper(), f"{path}:{node.lineno}: os.{node.attr}"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "open", f"{path}:{node.lineno}: open()"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: name_of(path))
def test_cffi_stays_in_one_module(path: Path) -> None:
    if name_of(path) == "vtpm_cuse.engine.libtpms":
        return
    for module, line in imports_of(path):
        assert module.partition(".")[0] != "cffi", f"{path}:{line}"
        assert module != "vtpm_cuse.engine._libtpms", f"{path}:{line}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: name_of(path))
def test_trio_stays_above_the_device(path: Path) -> None:
    """The device layer has one module that knows trio: the worker."""
    name = name_of(path)
    allowed = layer_of(name) in {"frontends", "service", "cli"} or name == "vtpm_cuse.device.worker"
    if not allowed:
        assert "trio" not in {module.partition(".")[0] for module, _ in imports_of(path)}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: name_of(path))
def test_no_print_below_the_command_line(path: Path) -> None:
    if layer_of(name_of(path)) == "cli":
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"{path}:{node.lineno}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: name_of(path))
def test_size_of_modules_and_functions(path: Path) -> None:
    """Past 600 lines a second role has moved in."""
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 600
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
            assert node.end_lineno - node.lineno < 60, f"{path}:{node.lineno}: {node.name}"
