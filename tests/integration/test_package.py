"""./setup package: what others install, from a wheel, without a checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Final

import pytest

from tests.support.programs import INSTALLED
from tests.support.unstable import (
    REASON,
    ROOT,
    TRIXIE_REASON,
    UNSTABLE,
    has_trixie,
    is_ready,
)
from tools.package import DIST, NAMES
from vtpm_cuse import __version__

needs_git = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a checkout of git")
BIN: Final = Path(sys.executable).parent
# As somebody has them who only wants to use it; nothing is compiled.
INSTALL_AND_USE: Final = """
cd "$1"
/usr/bin/python3 -m venv venv
venv/bin/python -m pip install -q --disable-pip-version-check --only-binary :all: "$2"
cd /
"$1/venv/bin/swtpm-cuse" --version
"$1/venv/bin/vtpm" run -- tpm2_getrandom --hex 8
"""

pytestmark = needs_git


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two folders with the packages, of two users on two machines."""
    folders = [tmp_path_factory.mktemp("dist") / name for name in ("a", "b")]
    surroundings: list[dict[str, str]] = [
        {"TZ": "UTC", "LC_ALL": "C", "PYTHONHASHSEED": "1"},
        {"TZ": "Asia/Tokyo", "LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "2"},
    ]
    builds = [
        subprocess.Popen(
            [sys.executable, "-m", "tools.package", "build", folder],
            cwd=ROOT,
            env={**os.environ, **variables},
            umask=umask,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for folder, variables, umask in zip(folders, surroundings, (0o077, 0o002), strict=True)
    ]
    said = [build.communicate()[0] for build in builds]
    assert [build.returncode for build in builds] == [0, 0], said
    return folders


def test_two_builds_are_alike(built: list[Path]) -> None:
    first, second = ({path.name: path.read_bytes() for path in b.iterdir()} for b in built)
    assert set(first) == set(NAMES)
    assert first == second


def test_the_sources_are_what_git_has_and_nothing_else(built: list[Path]) -> None:
    git = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z"]
    known = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    with tarfile.open(built[0] / NAMES[0]) as archive:
        members = archive.getmembers()
    files = {member.name.partition("/")[2] for member in members if not member.isdir()}
    made = {name for name in files if name.startswith("vtpm_cuse.egg-info/")} | {"PKG-INFO"}
    there = {name for name in known.split("\0") if name and os.path.lexists(ROOT / name)}
    assert files - made == there
    assert {(member.uid, member.gid, member.uname) for member in members} == {(0, 0, "")}


def test_the_wheel_is_for_every_python_and_has_the_binding(built: list[Path]) -> None:
    with zipfile.ZipFile(built[0] / NAMES[1]) as wheel:
        names = set(wheel.namelist())
        metadata = wheel.read(f"vtpm_cuse-{__version__}.dist-info/METADATA").decode()
    scripts = f"vtpm_cuse-{__version__}.data/scripts"
    assert {f"{scripts}/{name}" for name in INSTALLED} < names
    assert "vtpm_cuse/engine/_libtpms.py" in names
    assert not {name for name in names if name.endswith((".so", ".pyc"))}
    assert f"\nVersion: {__version__}\n" in metadata


@pytest.mark.parametrize(
    "checker", [("twine", "check", "--strict"), ("check-wheel-contents",)], ids=lambda c: c[0]
)
def test_an_index_takes_them(checker: tuple[str, ...], built: list[Path]) -> None:
    names = NAMES if checker[0] == "twine" else NAMES[1:]
    done = subprocess.run(
        [BIN / checker[0], *checker[1:], *(built[0] / name for name in names)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "enter",
    [
        pytest.param([], id="native"),
        pytest.param(
            [UNSTABLE, "--share", "FOLDER", "--"],
            id="unstable",
            marks=pytest.mark.skipif(not is_ready(), reason=REASON),
        ),
        pytest.param(
            [UNSTABLE, "--suite", "trixie", "--share", "FOLDER", "--"],
            id="trixie",
            marks=pytest.mark.skipif(not has_trixie(), reason=TRIXIE_REASON),
        ),
    ],
)
def test_it_works_in_a_clean_environment(
    enter: list[str | Path], built: list[Path], tmp_path: Path
) -> None:
    wheel = tmp_path / NAMES[1]
    wheel.write_bytes((built[0] / NAMES[1]).read_bytes())
    command = [*enter, "sh", "-ec", INSTALL_AND_USE, "sh", tmp_path, wheel]
    done = subprocess.run(
        [tmp_path if word == "FOLDER" else word for word in command],
        env={**os.environ, "CC": "/bin/false"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    version, number = done.stdout.splitlines()
    assert f"(vtpm-cuse {__version__})" in version
    assert len(bytes.fromhex(number)) == 8


def test_without_git_there_are_no_sources(tmp_path: Path) -> None:
    """Or what only lies there might get out."""
    done = subprocess.run(
        [sys.executable, "-m", "tools.package", "build", tmp_path / DIST],
        cwd=ROOT,
        env={**os.environ, "GIT_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("setup: only a checkout says what belongs to the sources: ")
    assert len(done.stderr.splitlines()) == 1
