"""Where programs are found: by absolute folders of PATH, and by nobody's current folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from vtpm_cuse.containers import nodes
from vtpm_cuse.containers.nodes import Access
from vtpm_cuse.errors import FrontendError
from vtpm_cuse.programs import find_program

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, in which somebody has put two programs."""
    for name in ("tool", "udevadm"):
        (tmp_path / name).write_text("#!/bin/sh\n: >ran\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("relative", ["", ".", "..", "x/.."])
def test_only_absolute_folders_count(
    here: Path, monkeypatch: pytest.MonkeyPatch, relative: str
) -> None:
    monkeypatch.setenv("PATH", relative)
    assert find_program("tool") is None
    assert find_program("tool", relative) is None
    monkeypatch.setenv("PATH", f"{relative}:/none:{here}")
    assert find_program("tool") == str(here / "tool")
    assert find_program("tool", "/none") is None
    assert find_program("tool", f"{relative}:{here}") == str(here / "tool")


def test_a_path_is_taken_as_it_is(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/none")
    assert find_program("./tool") == "./tool"
    assert find_program(str(here / "tool")) == str(here / "tool")
    (here / "tool").chmod(0o644)
    assert find_program("./tool") is None


def test_udev_is_asked_by_its_own_program(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "UDEV", here)
    monkeypatch.setenv("PATH", ":/none")
    with pytest.raises(FrontendError, match="udevadm not found; install the package udev"):
        nodes.open_up([], Access())
    assert not (here / "ran").exists()
    monkeypatch.setenv("PATH", f"{here}:/none")
    nodes.open_up([], Access())
    assert (here / "ran").exists()
