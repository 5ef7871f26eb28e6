"""``./setup package``: wheel and source archive in dist/, byte for byte alike wherever they are built.

Run by the system's Python, so it needs nothing but that and git.
"""

from __future__ import annotations

import contextlib
import datetime
import gzip
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Final

from tools.programs import BUILD_PYTHON
from tools.steps import CACHE, TREE, fail, run_main, say, step, wrong_words
from vtpm_cuse import __version__

DIST: Final = Path("dist")
NAMES: Final = (f"vtpm_cuse-{__version__}.tar.gz", f"vtpm_cuse-{__version__}-py3-none-any.whl")
"""The source archive and the wheel."""
_WORK: Final = CACHE / "package"
# A build backend is called in a process of its own, in the folder of what it builds.
_HOOK: Final = (
    "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
)


def day_of_release(changes: str, version: str) -> datetime.date:
    """The day that the newest heading of the changelog *changes* has.

    Raises ValueError if that heading is not *version*'s, or has no day.
    """
    first = changes.partition("\n## ")[2].partition("\n")[0]
    named, _, day = first.partition(", ")
    if named == version:
        with contextlib.suppress(ValueError):
            return datetime.datetime.strptime(f"{day} +0000", "%Y-%m-%d %z").date()
    raise ValueError(
        f"the first heading of CHANGELOG.md has to be '## {version}, YYYY-MM-DD', not '## {first}'"
    )


def _source_time() -> int:
    """What all files are dated, in seconds since 1970."""
    given = os.environ.get("SOURCE_DATE_EPOCH")
    if given is not None:
        if not (given.isascii() and given.isdigit()):
            fail(f"SOURCE_DATE_EPOCH is no number of seconds: '{given}'")
        return int(given)
    try:
        day = day_of_release((TREE / "CHANGELOG.md").read_text(encoding="utf-8"), __version__)
    except ValueError as exc:
        fail(str(exc))
    midnight = datetime.datetime.combine(day, datetime.time(), datetime.UTC)
    return int(midnight.timestamp())


def copy_tracked(tree: Path) -> None:
    """Copies what git knows of this checkout, as it is now: nothing that just lies here gets out."""
    # A checkout of somebody else's is trusted by who runs its code.
    git = ("git", "-c", f"safe.directory={TREE}", "ls-files", "-z")
    try:
        done = subprocess.run(git, cwd=TREE, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        fail("git is missing, which says what belongs to the sources")
    except subprocess.CalledProcessError as exc:
        fail(f"only a checkout says what belongs to the sources: {exc.stderr.strip()}")
    for name in filter(None, done.stdout.split("\0")):
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # deleted, and not yet committed
            shutil.copy(TREE / name, path, follow_symlinks=False)


def write_alike(source: Path, target: Path, time: int) -> None:
    """Writes a .tar.gz anew with nothing in it of who packed it, when and where."""
    with (
        tarfile.open(source) as old,
        target.open("wb") as file,
        gzip.GzipFile("", "wb", fileobj=file, mtime=time) as packed,
        tarfile.open(fileobj=packed, mode="w") as new,
    ):
        for member in sorted(old, key=lambda member: member.name):
            program = member.isdir() or member.mode & 0o100
            member.mode = 0o755 if program else 0o644
            member.uid = member.gid = 0
            member.uname = member.gname = ""
            member.mtime = time
            member.pax_headers = {}
            new.addfile(member, old.extractfile(member) if member.isfile() else None)


def build(folder: Path) -> None:
    """Makes both with the setuptools of this Python, the wheel from the source archive."""
    time = _source_time()
    environment = {**os.environ, "SOURCE_DATE_EPOCH": str(time)}
    os.umask(0o022)  # for the modes of what is in the wheel
    folder.mkdir(parents=True, exist_ok=True)

    def call(hook: str, tree: Path, into: Path) -> None:
        command: list[str | Path] = [sys.executable, "-c", _HOOK, hook, into]
        if subprocess.run(command, cwd=tree, env=environment, check=False).returncode:
            fail(f"{hook} failed")

    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        copy_tracked(work / "tree")
        call("build_sdist", work / "tree", work)
        write_alike(work / NAMES[0], folder / NAMES[0], time)
        with tarfile.open(folder / NAMES[0]) as archive:
            archive.extractall(work / "unpacked")  # noqa: S202 - of our own making
        (unpacked,) = (work / "unpacked").iterdir()
        call("build_wheel", unpacked, folder.absolute())


def main() -> None:
    """Makes both, with nothing but what is pinned by its hash."""
    match sys.argv[1:]:
        case ["build", folder]:
            build(Path(folder))
        case []:
            _source_time()  # so that what is wrong is told before anything is fetched
            step("fetching what builds", [sys.executable, "-m", "tools.programs", "build-tools"])
            shutil.rmtree(_WORK, ignore_errors=True)
            building: list[str | Path] = [BUILD_PYTHON, "-m", "tools.package", "build", _WORK]
            step("building the packages", building)
            DIST.mkdir(exist_ok=True)
            for name in NAMES:
                (_WORK / name).replace(DIST / name)
                say(str(DIST / name))
        case _:
            wrong_words()


if __name__ == "__main__":
    run_main(main)
