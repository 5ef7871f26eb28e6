"""kernel-helpers/unstable as its caller sees it, in a folder that is there already."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.unstable import FOLDER, REASON, ROOT, UNSTABLE, is_ready
from tests.support.waiting import PATIENCE_SECONDS

needs_folder = pytest.mark.skipif(not is_ready(), reason=REASON)


def unstable(
    *words: str | Path, cwd: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [UNSTABLE, *words],
        cwd=cwd,
        env={**os.environ, **environment},
        check=False,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )


@needs_folder
def test_command_and_status() -> None:
    run = unstable("--", "sh", "-c", 'echo "$1"; pwd; exit 7', "sh", "two words")
    assert (run.returncode, run.stdout) == (7, f"two words\n{ROOT}\n")


@needs_folder
def test_other_engine_and_python() -> None:
    code = "import sys, vtpm_cuse; print(vtpm_cuse.__file__, sys.version_info >= (3, 13))"
    run = unstable("python", "-c", code)
    assert run.stdout == f"{ROOT}/vtpm_cuse/__init__.py True\n", run.stderr
    assert "swtpm" in unstable("swtpm", "--help").stdout


@needs_folder
def test_nothing_stays_mounted() -> None:
    mounts = unstable("cat", "/proc/self/mounts").stdout
    assert f" {ROOT} " in mounts
    assert str(FOLDER) not in Path("/proc/self/mounts").read_text()


@needs_folder
def test_shared_folder(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    hidden = tmp_path / "hidden"
    hidden.write_text("")
    script = f"echo written >{shared}/file; test ! -e {hidden}"
    assert unstable("--share", shared, "--", "sh", "-c", script).returncode == 0
    assert (shared / "file").read_text() == "written\n"
    assert unstable("--share", tmp_path / "none", "--", "true").returncode == 125


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_two_checkouts_do_not_take_each_other_the_python(tmp_path: Path) -> None:
    """One folder serves them all, at the same time; this one has the host's programs."""
    folder = tmp_path / "cache/vtpm-cuse/unstable"
    for name in ("proc", "dev", "etc"):
        (folder / name).mkdir(parents=True)
    for name in ("bin", "lib", "lib64"):
        (folder / name).symlink_to(f"usr/{name}")
    found = []
    for checkout in ("first", "first", "second"):
        helper = tmp_path / checkout / "kernel-helpers/unstable"
        helper.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(UNSTABLE, helper)
        run = subprocess.run(
            [helper, "--inside", "--share", "/usr", "--", "sh", "-c", 'echo "${PATH%%:*}"'],
            cwd=helper.parent,
            env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")},
            check=True,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
        )
        found.append(run.stdout)
    assert found[0] == found[1] != found[2]
    assert all(path.endswith("/bin\n") for path in found)


@pytest.mark.parametrize(
    "words", [[], ["--"], ["--nonsense"], ["--share"], ["--suite", "../x", "true"]]
)
def test_bad_usage(words: list[str]) -> None:
    run = unstable(*words)
    assert run.returncode == 125
    assert run.stderr.startswith("usage: unstable")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_what_was_left_half_made_is_made_anew(tmp_path: Path) -> None:
    """A run that was killed leaves only a folder aside, and a failure leaves nothing in use."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "debootstrap").write_text('#!/bin/sh\necho "no network"\nmkdir -p "$4"\nexit 1\n')
    (tools / "debootstrap").chmod(0o755)
    part = tmp_path / "cache/vtpm-cuse/unstable.part"
    part.mkdir(parents=True)
    (part / "half").write_text("")
    path = f"{tools}:{os.environ['PATH']}"
    run = unstable("--", "true", XDG_CACHE_HOME=str(tmp_path / "cache"), PATH=path)
    assert run.returncode == 125
    assert "no network" in run.stderr
    assert not (part / "half").exists()
    assert not (tmp_path / "cache/vtpm-cuse/unstable").exists()
