"""The examples of docs/lab.md do what is said of them."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import TYPE_CHECKING, Final

import pytest

from tests.support.private import runtime_folder
from tests.support.sockets import TREE, environment
from tests.support.waiting import PATIENCE_SECONDS
from vtpm_cuse import lab
from vtpm_cuse.lab import Tpm, pytest_plugin

if TYPE_CHECKING:
    from pathlib import Path

PAPER: Final = (TREE / "docs" / "lab.md").read_text(encoding="utf-8")
EXAMPLES: Final = re.findall(r"```python\n(.*?)```", PAPER, re.DOTALL)
PROGRAMS: Final = [code for code in EXAMPLES if "def test_" not in code]


@pytest.mark.parametrize("code", PROGRAMS, ids=range(len(PROGRAMS)))
def test_an_example_runs(code: str, tmp_path: Path) -> None:
    with runtime_folder() as runtime:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code],
            check=False,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**environment(), "XDG_RUNTIME_DIR": str(runtime)},
            timeout=PATIENCE_SECONDS,
        )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_tables_name_what_is_there() -> None:
    rows = re.findall(r"^\| (`[^|]*)\|", PAPER, re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    with Tpm() as tpm:
        variables = set(tpm.env)
    fixtures = {name for name in vars(pytest_plugin) if name.startswith(("tpm", "manu", "faul"))}
    assert named == variables | fixtures
    assert set(re.findall(r"`(?:tpm\.)?([a-z_]\w*)`", PAPER)) <= fixtures | set(dir(Tpm)) | {
        *("save", "said", "cmd", "fork", "exec")
    }
    for code in EXAMPLES:
        for names in re.findall(r"from vtpm_cuse.lab import (.*)", code):
            assert set(names.split(", ")) <= set(lab.__all__)
