"""Imports run downwards only, along the lines of the table in docs/architecture.md."""

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

ERRORS: Final = frozenset({"errors", "faults"})
LIFE: Final = ERRORS | {"config", "service.life", "service.confine", "service.process"}
SERVED: Final = LIFE | {"acquire", "serve", "vtpm"}
WORDS: Final = frozenset({"cli.words", "errors"})

# A room, or a module that knows more or less than its room, to what it may import besides itself.
# Of the names here the longest that fits is the one that counts, for importer and imported alike:
# who may import "storage.base" may import that module and no other of storage.
MAY_IMPORT: Final[dict[str, frozenset[str]]] = {
    # the ground
    "errors": frozenset(),
    "wire": frozenset({"errors"}),
    "faults": frozenset({"errors", "wire"}),
    "files": frozenset(),
    "programs": frozenset(),
    "storage.locations": frozenset(),
    "config": frozenset({"storage.locations"}),
    # messages, state, TPMs
    "proto": ERRORS | {"wire"},
    "storage": ERRORS
    | {"config", "files", "wire", "storage.base", "storage.locations", "storage.modes"},
    "storage.base": frozenset({"errors"}),
    "storage.modes": frozenset({"storage.base"}),
    "storage.sealed": ERRORS | {"config", "wire", "storage.base", "storage"},
    "engine": ERRORS | {"config", "files", "wire", "engine.base"},
    "engine.base": frozenset(),
    "vtpm": ERRORS | {"wire", "proto", "engine.base", "resmgr", "storage.base", "storage.sealed"},
    "resmgr": frozenset({"errors", "wire", "engine.base"}),
    # from outside, and to the outside
    "containers": frozenset({"errors", "programs"}),
    "acquire": frozenset(
        {"acquire.keeper", "config", "containers", "errors", "files", "programs", "proto", "wire"}
    ),
    "acquire.keeper": frozenset({"files"}),
    "client": frozenset({"errors", "programs", "wire"}),
    "lab": frozenset({"client", "errors", "proto", "wire"}),
    "serve": ERRORS | {"acquire", "proto", "vtpm", "wire"},
    "ca": frozenset({"client", "errors", "files", "wire"}),
    # the life of one vTPM
    "service.confine": frozenset({"config", "errors", "files", "service.process"})
    | {"storage.base", "storage.modes"},
    "service.process": frozenset({"config", "errors", "files"}),
    "service.keys": frozenset({"config", "errors", "service.confine", "storage"}),
    "service.remover": frozenset({"acquire.keeper", "service.confine", "service.process"}),
    "service.compose": ERRORS
    | {"config", "engine", "engine.base", "service.keys", "service.process", "storage"}
    | {"storage.base", "storage.sealed", "vtpm", "wire"},
    "service.life": LIFE
    | {"acquire", "files", "serve", "service.compose", "service.remover", "vtpm", "wire"},
    "service.cuse": SERVED | {"proto"},
    "service.fuse": SERVED | {"client", "proto", "vtpm.attributes"},
    "service.socket": SERVED,
    "service.chardev": SERVED | {"service.socket"},
    "service.doctor": frozenset(
        {"errors", "programs", "service.compose", "service.confine", "service.flaws"}
    ),
    "service.flaws": frozenset(
        {"engine.base", "service.compose", "service.confine", "service.doctor", "wire"}
    ),
    "manufacture": ERRORS
    | {"acquire.keeper", "ca", "client", "config", "engine.base", "files", "programs"}
    | {"service.compose", "service.confine", "service.process"}
    | {"storage", "storage.base", "storage.locations", "wire"},
    # many of them
    "fleet": frozenset({"errors", "wire", "fleet.base"}),
    "fleet.base": frozenset({"config"}),
    "fleet.states": frozenset({"config", "errors", "files", "fleet", "fleet.base", "wire"})
    | {"service.keys", "storage", "storage.base", "storage.sealed"},
    "fleet.states.archives": frozenset({"errors", "fleet.base", "wire"}),
    "fleet.manager": ERRORS
    | {"acquire", "client", "config", "containers", "files", "programs", "storage"}
    | {
        "storage.base",
        "wire",
        "fleet",
        "fleet.base",
        "fleet.manager.api",
        "fleet.opener",
        "fleet.states",
    }
    | {"manufacture", "service.confine", "service.process"},
    "fleet.manager.api": ERRORS
    | {"acquire", "config", "fleet.base", "fleet.states.archives", "wire"},
    "fleet.opener": ERRORS
    | {"acquire", "acquire.keeper", "fleet", "fleet.base", "service.confine"},
    "fleet.depot": frozenset({"errors", "fleet", "service.confine"}),
    "fleet.worker": ERRORS
    | {"acquire", "config", "fleet", "proto", "resmgr", "serve", "storage.base", "vtpm", "wire"}
    | {"service.compose", "service.confine"},
    "fleet.zygote": frozenset({"config", "errors", "fleet", "fleet.worker"})
    | {"service.confine", "service.process"},
    "tree": frozenset({"acquire", "client", "errors", "service.confine", "service.process"})
    | {"wire"},
    # programs
    "cli.words": ERRORS | {"files"},
    "cli.registry": frozenset({"cli.words"}),
    "cli.swtpm": WORDS,
    "cli.swtpm_doctor": WORDS | {"service.doctor"},
    "cli.controls": WORDS | {"client"},
    "cli.swtpm_ioctl": WORDS | {"cli.controls", "cli.ioctl_commands"},
    "cli.ioctl_commands": WORDS | {"client", "files", "service.confine", "wire"},
    "cli.swtpm_bios": WORDS | {"cli.bios_steps", "client", "service.confine", "wire"},
    "cli.bios_steps": frozenset({"errors", "wire"}),
    "cli.ca": WORDS | {"ca", "faults", "files", "service.confine"},
    "cli.vtpm": WORDS
    | {"cli.controls", "client", "config", "files", "lab", "programs", "service.keys"}
    | {"tree", "wire"},
    "cli.setup": WORDS
    | {"ca", "config", "files", "manufacture", "service.confine", "service.process"}
    | {"storage", "storage.locations"},
    "cli.emulator": WORDS
    | {"acquire", "config", "engine.base", "files", "service.chardev", "service.compose"}
    | {"service.confine", "service.cuse", "service.fuse", "service.process", "service.socket"}
    | {"storage", "storage.locations", "vtpm.attributes"},
    "cli.vtpmd": WORDS
    | {"cli.emulator", "fleet", "fleet.manager", "service.confine", "service.process"},
    "vtpm.attributes": ERRORS | {"vtpm"},
}

# For all others, engines and stores are what the two `base` modules say: `service.compose` makes
# engines, `storage.stores` stores.
CONCRETE: Final = {
    "vtpm_cuse.engine.libtpms",
    "vtpm_cuse.storage.directory",
    "vtpm_cuse.storage.linear",
    "vtpm_cuse.storage.memory",
}
MAKE_THEM: Final = ("service.compose", "engine", "storage")

SANS_IO: Final = {"errors", "faults", "wire", "proto", "resmgr"}
NO_IO: Final = {
    *{"socket", "select", "selectors", "fcntl", "subprocess", "threading", "queue", "time"},
    *{"asyncio", "trio", "cffi", "pathlib", "io", "shutil", "tempfile", "signal", "logging"},
}
KNOW_TRIO: Final = {"serve", "service", "acquire", "fleet", "tree"}


def name_of(path: Path) -> str:
    """The module's name within the package."""
    relative = path.relative_to(PACKAGE).with_suffix("")
    return ".".join(part for part in relative.parts if part != "__init__")


def room_of(module: str) -> str:
    """The longest name in the table that *module* is or is in."""
    parts = module.split(".")
    names = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((name for name in names if name in MAY_IMPORT), "")


def imports_of(path: Path) -> Iterator[tuple[str, int]]:
    """All imports, wherever they are in the file: module and line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: relative import"
            assert node.module is not None
            folder = PACKAGE.parent.joinpath(*node.module.split("."))
            inside = folder.is_dir() and node.module.startswith("vtpm_cuse")
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                there = inside and PACKAGE.parent.joinpath(*module.split(".")).with_suffix(".py")
                yield module if there and there.exists() else node.module, node.lineno


def own_imports_of(path: Path) -> Iterator[tuple[str, int]]:
    """Those of this package, by their names within it; not the version."""
    for module, line in imports_of(path):
        if module.startswith("vtpm_cuse."):
            yield module.removeprefix("vtpm_cuse."), line


def top_of(path: Path) -> str:
    """The folder at the top."""
    return name_of(path).partition(".")[0]


each_module = pytest.mark.parametrize("path", MODULES, ids=name_of)


@each_module
def test_imports_run_along_the_table(path: Path) -> None:
    if not (room := room_of(name_of(path))):
        assert name_of(path) in {"", "cli", "service"}, "a room that the table does not know"
    for module, line in own_imports_of(path):
        target = room_of(module)
        allowed = target == room or target in MAY_IMPORT.get(room, frozenset())
        assert allowed, f"{path}:{line}: {room or 'the package'} must not import {module}"


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_the_table_has_nothing_that_nobody_needs(room: str) -> None:
    used = {
        room_of(module)
        for path in MODULES
        if room_of(name_of(path)) == room
        for module, _ in own_imports_of(path)
    }
    assert set(MAY_IMPORT[room]) - COMMON <= used


COMMON: Final = ERRORS | WORDS | LIFE | SERVED
"""Sets that several rows share: a row may need less of one."""


@each_module
def test_engines_and_stores_are_made_in_their_rooms_alone(path: Path) -> None:
    if name_of(path).startswith(MAKE_THEM):
        return
    used = {module for module, _ in imports_of(path)} & CONCRETE
    assert not used, f"{path} imports {used}"


@each_module
def test_sans_io(path: Path) -> None:
    if top_of(path) not in SANS_IO:
        return
    for module, line in imports_of(path):
        assert module.partition(".")[0] not in NO_IO, f"{path}:{line}: {module}"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == "os":
                assert node.attr.isupper(), f"{path}:{node.lineno}: os.{node.attr}"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "open", f"{path}:{node.lineno}: open()"


@each_module
def test_cffi_stays_in_one_module(path: Path) -> None:
    if name_of(path) == "engine.libtpms":
        return
    for module, line in imports_of(path):
        assert module.partition(".")[0] != "cffi", f"{path}:{line}"
        assert module != "vtpm_cuse.engine._libtpms", f"{path}:{line}"


@each_module
def test_trio_stays_with_what_serves(path: Path) -> None:
    if top_of(path) not in KNOW_TRIO:
        assert "trio" not in {module.partition(".")[0] for module, _ in imports_of(path)}


@each_module
def test_no_print_below_the_command_line(path: Path) -> None:
    if top_of(path) == "cli":
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"{path}:{node.lineno}"


@each_module
def test_size_of_modules_and_functions(path: Path) -> None:
    """Past 600 lines a second role has moved in."""
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 600
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
            assert node.end_lineno - node.lineno < 60, f"{path}:{node.lineno}: {node.name}"
