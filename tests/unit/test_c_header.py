"""The C header, as a compiler sees it: numbers, and where a program finds each field."""

from __future__ import annotations

import inspect
import shutil
import struct
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from tests.support import ptm as known
from tools.manual.header import FIELDS, STRUCTURES, control_name
from vtpm_cuse.wire.layout import HOST
from vtpm_cuse.wire.ptm import PTM_SPECS, PtmCommand, PtmResultResponse

if TYPE_CHECKING:
    from vtpm_cuse.wire.layout import WireStruct

OURS: Final = Path(__file__).parents[2] / "include"
PEERS: Final = Path("/usr/include")
NEWEST_OF_PEER: Final = PtmCommand.PTM_GET_INFO
"""In the oldest header of the C suite's that is compared."""


def printed(folder: Path, include: Path, expressions: list[str]) -> list[int]:
    """What a C program with that header says that they are."""
    compiler = shutil.which("gcc")
    if compiler is None or not (include / "swtpm/tpm_ioctl.h").exists():
        pytest.skip("no gcc, or no such header")
    lines = "".join(f'printf("%lu\\n", (unsigned long)({each}));' for each in expressions)
    (folder / "ask.c").write_text(
        "#include <swtpm/tpm_ioctl.h>\n#include <stddef.h>\n#include <stdint.h>\n"
        f"#include <stdio.h>\n#include <sys/ioctl.h>\nint main(void) {{ {lines} return 0; }}\n"
    )
    words = [compiler, "-Wall", "-Wextra", "-Werror", "-I", str(include), "-o", "ask", "ask.c"]
    subprocess.run(words, cwd=folder, check=True)
    done = subprocess.run([folder / "ask"], check=True, capture_output=True, text=True)
    return [int(line) for line in done.stdout.split()]


def places(structure: type[WireStruct]) -> dict[str, tuple[int, int]]:
    """Offset and size of each field, by where a value of it shows up in the bytes."""
    names = [*inspect.get_annotations(structure)]
    nothing = [b"" if name in {"data", "text"} else 0 for name in names]
    ends = []
    for place, name in enumerate(names):
        if name in {"data", "text"}:
            ends.append((structure.SIZE, structure.TAIL))
            continue
        for size in (8, 4, 1):  # the widest value that fits
            values = [*nothing]
            values[place] = (1 << 8 * size) - 1
            try:
                raw = structure(*values).pack(HOST)
            except struct.error:
                continue
            ends.append((raw.index(b"\xff"), size))
            break
    return {FIELDS.get(name, name): found for name, found in zip(names, ends, strict=True)}


def expected(commands: list[PtmCommand]) -> dict[str, int]:
    """What the header must say, by C expressions."""
    found = {"sizeof(ptm_res)": 4, "sizeof(ptm_cap)": 8}
    for command in commands:
        found[command.name] = getattr(known, command.name.removeprefix("PTM_"))
        found[control_name(command)] = command + 1
        if (name := STRUCTURES.get(command)) is None:
            continue
        spec = PTM_SPECS[command]
        found[f"sizeof(struct {name})"] = found[command.name] >> 16 & 0x3FFF
        for side, structure in (("req", spec.request), ("resp", spec.response)):
            for field, (offset, size) in places(structure).items():
                found[f"offsetof({name}, u.{side}.{field})"] = offset
                found[f"sizeof((({name} *)0)->u.{side}.{field})"] = size
    return found


@pytest.mark.parametrize("include", [OURS, PEERS], ids=["ours", "the C suite's"])
def test_numbers_and_places(tmp_path: Path, include: Path) -> None:
    newest = max(PtmCommand) if include == OURS else NEWEST_OF_PEER
    wanted = expected([command for command in PtmCommand if command <= newest])
    found = printed(tmp_path, include, [*wanted])
    assert dict(zip(wanted, found, strict=True)) == wanted


def test_every_argument_that_is_more_than_a_result_has_a_structure() -> None:
    for command, spec in PTM_SPECS.items():
        plain = spec.response is PtmResultResponse and not spec.request.SIZE
        assert (command in STRUCTURES) is not (plain or command == PtmCommand.PTM_GET_CAPABILITY)


def test_fields_follow_one_another() -> None:
    for spec in PTM_SPECS.values():
        for structure in spec:
            for (before, size), (after, _) in pairwise(places(structure).values()):
                assert before + size == after
