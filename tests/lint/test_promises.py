"""What the design promises about imports, checked in fresh interpreters."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = {"trio", "cffi", "_cffi_backend", "asyncio", "socket", "subprocess", "cryptography"}


def modules_after(statement: str) -> set[str]:
    """Top-level names of what is loaded after *statement*."""
    code = f"import sys; before = set(sys.modules); {statement}; print(*set(sys.modules) - before)"
    run = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT
    )
    return set(run.stdout.split())


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import vtpm_cuse", HEAVY | {"vtpm_cuse.errors"}),
        ("import vtpm_cuse.wire.ptm, vtpm_cuse.wire.fuse, vtpm_cuse.wire.blob", HEAVY),
        ("import vtpm_cuse.wire.trace, vtpm_cuse.wire.pcapng, vtpm_cuse.wire.rc", HEAVY),
        ("import vtpm_cuse.cli.vtpm.vtpm_rc, vtpm_cuse.cli.vtpm.vtpm_trace", HEAVY),
        ("import vtpm_cuse.proto.cuse, vtpm_cuse.faults", HEAVY),
        ("import vtpm_cuse.storage.directory, vtpm_cuse.storage.linear", HEAVY),
        ("import vtpm_cuse.storage.sealed", HEAVY),
        ("import vtpm_cuse.vtpm.vtpm, vtpm_cuse.vtpm.file", HEAVY),
        ("import vtpm_cuse.config", HEAVY),
        ("import vtpm_cuse.client.ioctl", {"trio", "cffi", "_cffi_backend", "asyncio"}),
        ("import vtpm_cuse.cli.swtpm_ioctl", {"trio", "cffi", "_cffi_backend", "asyncio"}),
        ("import vtpm_cuse.service.chardev, vtpm_cuse.acquire.watcher", {"pyroute2", "asyncio"}),
        ("import vtpm_cuse.containers.nodes, vtpm_cuse.containers.oci", {"pyroute2", "asyncio"}),
        ("import vtpm_cuse.engine.libtpms", {"trio", "asyncio", "pycparser"}),
    ],
)
def test_imports_stay_light(statement: str, absent: set[str]) -> None:
    assert not modules_after(statement) & absent


def test_import_opens_and_starts_nothing() -> None:
    """A warm parent may fork at any time: no descriptor, thread or library comes with an import.

    But for what takes the place of libffi's: ends of pipes that lead nowhere.
    """
    code = (
        "import os, sys, threading\n"
        "def held(): return {os.readlink(f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd')"
        " if os.path.exists(f'/proc/self/fd/{n}')}\n"
        "before = held()\n"
        "import vtpm_cuse.service.compose, vtpm_cuse.acquire.cuse, vtpm_cuse.service.cuse\n"
        "print([what for what in held() - before if what[:5] != 'pipe:'], threading.active_count())\n"
        "print('libtpms' in open('/proc/self/maps').read())\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT
    )
    assert run.stdout.split("\n")[:2] == ["[] 1", "False"]


def tracked_files() -> list[Path]:
    run = subprocess.run(
        ["git", "ls-files", "-z"], check=False, capture_output=True, text=True, cwd=ROOT
    )
    if run.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in run.stdout.split("\0") if name]


def places() -> set[Path]:
    """Where this checkout is, and the one that it is a worktree of."""
    command = ["git", "rev-parse", "--path-format=absolute", "--git-common-dir"]
    run = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    return {ROOT.resolve(), Path(run.stdout.strip()).parent.resolve()}


def test_no_paths_of_one_machine() -> None:
    files = tracked_files()
    # A folder at the top, as /src, may be anybody's.
    here = [re.escape(bytes(place)) for place in places() if len(place.parts) > 2]
    pattern = re.compile(rb"(?<![\w.])(?:%s)/" % b"|".join([rb"/home/[a-z]+", rb"/Users", *here]))
    for path in files:
        if path.is_file() and (found := pattern.search(path.read_bytes())):
            pytest.fail(f"{path}: {found.group()!r}")
