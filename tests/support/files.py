"""File systems and umasks for tests of stores."""

from __future__ import annotations

import contextlib
import os
import subprocess
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextlib.contextmanager
def tmpfs(where: Path, options: str) -> Iterator[Path]:
    """A file system of its own at *where*; skips the test where mounting is not permitted."""
    where.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "none", where],
        check=False,
        capture_output=True,
        text=True,
    )
    if mount.returncode:
        pytest.skip(f"needs mount: {mount.stderr.strip()}")
    try:
        yield where
    finally:
        subprocess.run(["umount", "--lazy", where], check=True)


@contextlib.contextmanager
def umask(value: int) -> Iterator[None]:
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


@contextlib.contextmanager
def descriptors_closed() -> Iterator[None]:
    """Closes at the end what was opened inside and left open: descriptors are not for other tests."""
    before = open_descriptors()
    yield
    for entry in open_descriptors() - before:
        os.close(int(entry.partition(":")[0]))


def open_descriptors() -> set[str]:
    """The descriptors of this process, by what they are."""
    found = {f"{fd}:{what}" for fd, what in open_files(os.getpid()).items()}
    return {entry for entry in found if "/proc/" not in entry}


def open_files(pid: int) -> dict[int, str]:
    """What a process has open, which may change meanwhile."""
    found = {}
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed since
            found[int(fd)] = os.readlink(f"/proc/{pid}/fd/{fd}")
    return found
