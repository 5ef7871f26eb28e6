"""Whoever finds a pid file finds a number in it, and nobody removes another's."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from vtpm_cuse.config import PidConfig
from vtpm_cuse.errors import UsageError
from vtpm_cuse.service.process.pidfile import PidFile
from vtpm_cuse.service.remover import Remover

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "x.pid"


def opened(path: Path, *, near: bool) -> tuple[PidFile, Remover]:
    """A pid file of this process that is still to be written."""
    path.parent.mkdir(exist_ok=True)
    pid_file = PidFile(PidConfig(path=str(path)), 1)
    pid_file.open(None)
    remover = Remover(str(path.parent) if near else None)
    remover.start((), pid_file, to_come=False)
    return pid_file, remover


@pytest.mark.parametrize("near", [True, False])
def test_it_appears_with_its_number(path: Path, near: bool) -> None:
    pid_file, remover = opened(path, near=near)
    assert not path.exists()
    pid_file.write(remover.write_pid)
    assert path.read_bytes() == b"%d" % os.getpid()
    remover.end(pid_files=pid_file.ours)
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("near", [True, False])
def test_nothing_is_left_of_one_that_was_never_written(path: Path, near: bool) -> None:
    pid_file, remover = opened(path, near=near)
    assert len(list(path.parent.iterdir())) == 1
    remover.end(pid_files=pid_file.ours)
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("near", [True, False])
def test_one_that_is_there_stays_the_same_file(path: Path, near: bool) -> None:
    """libvirt makes it, and holds it locked."""
    path.parent.mkdir()
    path.write_text("old")
    before = path.stat().st_ino
    pid_file, remover = opened(path, near=near)
    assert path.read_text() == "old"
    pid_file.write(remover.write_pid)
    assert (path.stat().st_ino, path.read_text()) == (before, str(os.getpid()))
    remover.end(pid_files=pid_file.ours)
    assert not path.exists()


@pytest.mark.parametrize("near", [True, False])
def test_a_successors_is_left(path: Path, near: bool) -> None:
    pid_file, remover = opened(path, near=near)
    pid_file.write(remover.write_pid)
    path.unlink()
    path.write_text("4711")
    remover.end(pid_files=pid_file.ours)
    assert path.read_text() == "4711"


@pytest.mark.parametrize(("content", "is_left"), [(str(os.getpid()), False), ("4711", True)])
def test_one_that_the_caller_writes_is_removed_by_its_number(
    path: Path, content: str, is_left: bool
) -> None:
    path.parent.mkdir()
    remover = Remover(None)
    remover.start((), PidFile(PidConfig(path=str(path)), 1), to_come=True)
    path.write_text(content)
    remover.end(pid_files=True)
    assert path.exists() is is_left


def test_what_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "fifo").parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "none" / "x.pid", tmp_path, tmp_path / "fifo"):
        with pytest.raises(UsageError, match="Could not write pid file") as caught:
            PidFile(PidConfig(path=str(path)), 7).open(None)
        assert caught.value.exit_status == 7
