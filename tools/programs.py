"""What ``./setup deploy`` puts into a system, what builds it, and ``./setup pin``: in which versions.

Run by the system's Python, so it needs nothing but that.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Final

from tools.steps import CACHE, as_root, become, can_be_root, fail, run_main, step, wrong_words

_WORK: Final = CACHE / "deploy"
_VENV: Final = _WORK / "venv"
_TOOLS: Final = CACHE / "build-tools"
BUILD_PYTHON: Final = _TOOLS / "bin/python"
"""One with what builds this package, once `make_build_tools` has run."""
_PIP: Final = ("-m", "pip", "--disable-pip-version-check", "--no-input")
# Nothing runs, now or later, that is not in the lists, with its hash; nothing is built but this
# package.
_PINNED: Final = ("--require-hashes", "--only-binary", ":all:", "-r")
_OWN: Final = ("--no-deps", "--no-index")


def _call(*command: str | Path, text: str | None = None) -> None:
    done = subprocess.run(command, input=text, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def _own_folder(path: Path) -> None:
    """Makes it anew, so that nobody else may write there."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    for folder in (CACHE, path):
        folder.chmod(folder.stat().st_mode & 0o7755)


def make_build_tools() -> None:
    """Makes `BUILD_PYTHON`, with nothing but what is pinned."""
    _own_folder(_TOOLS)
    _call(sys.executable, "-m", "venv", _TOOLS)
    _call(BUILD_PYTHON, *_PIP, "install", *_PINNED, "deploy/requirements-build.txt")


def build() -> None:
    """Makes the programs, for `deploy/place` to put where they belong."""
    make_build_tools()
    _own_folder(_WORK)
    shutil.rmtree("build", ignore_errors=True)  # or what was deleted since would come along
    _call(sys.executable, "-m", "venv", "--without-pip", _VENV)
    pip = (BUILD_PYTHON, *_PIP)
    install = (*pip, "--python", _VENV / "bin/python", "install", "--no-compile")
    _call(*install, *_PINNED, "deploy/requirements.txt")
    _call(*pip, "wheel", "--no-build-isolation", *_OWN, "--wheel-dir", _WORK, ".")
    _call(*install, *_OWN, *_WORK.glob("vtpm_cuse-*.whl"))


def pin() -> None:
    """Lists the newest versions that package and build ask for, with the hashes of their files."""
    venv = CACHE / "pin"
    _call(sys.executable, "-m", "venv", venv)
    _call(venv / "bin/python", *_PIP, "install", "uv")
    compile_ = (
        *(venv / "bin/uv", "pip", "compile", "--upgrade", "--universal"),
        *("--python-version", "3.11", "--generate-hashes", "--no-annotate"),
        *("--custom-compile-command", "./setup pin"),
    )
    _call(*compile_, "setup.cfg", "--output-file", "deploy/requirements.txt")
    wanted = tomllib.loads(Path("pyproject.toml").read_text())["build-system"]["requires"]
    to = ("--output-file", "deploy/requirements-build.txt")
    _call(*compile_, "-", *to, text="\n".join(wanted))


def deploy(caller: str, words: list[str]) -> None:
    """Builds the programs and puts them below a root, or takes out again what was put."""
    root, placing = "/", [str(_VENV)]
    while words:
        word = words.pop(0)
        name, given, value = word.partition("=")
        if word == "--uninstall":
            placing = ["--uninstall"]
        elif name == "--root" and (given or words):
            root = value if given else words.pop(0)
        else:
            wrong_words()
    root = os.path.join(caller, root)
    if placing != ["--uninstall"]:
        step("building the programs", [sys.executable, "-m", "tools.programs", "build"])
        try:
            os.makedirs(root, exist_ok=True)
        except OSError as exc:
            fail(f"{root}: {exc.strerror}")
    place = ["deploy/place", "--root", root, *placing]
    if os.access(root, os.W_OK):
        become(place)
    if can_be_root():
        become(as_root(place))
    fail(f'putting files below {root} needs root: type "sudo ./setup deploy"')


def main() -> None:
    """Does what the first word says."""
    what, *words = sys.argv[1:]
    if what == "build":
        build()
    elif what == "build-tools":
        make_build_tools()
    elif what == "pin":
        pin()
    else:
        caller, *words = words
        deploy(caller, words)


if __name__ == "__main__":
    run_main(main)
