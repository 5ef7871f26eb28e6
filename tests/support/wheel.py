"""The package as others get it: built from its sources, without the checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
SOURCES: Final = ("setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")


def copied_sources(folder: Path) -> Path:
    """A copy that may be built in."""
    tree = folder / "tree"
    made = shutil.ignore_patterns("__pycache__", "_libtpms.py")
    shutil.copytree(ROOT / "vtpm_cuse", tree / "vtpm_cuse", ignore=made)
    (tree / "deploy").mkdir()
    for name in (*SOURCES, "deploy/vtpm-cuse-python"):
        shutil.copy(ROOT / name, tree / name)
    return tree


def built_wheel(folder: Path) -> Path:
    """The wheel, by the build tools of this interpreter's environment."""
    pip = (sys.executable, "-m", "pip", "-q", "--disable-pip-version-check")
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", folder)
    subprocess.run([*pip, "wheel", *options, copied_sources(folder)], check=True)
    (wheel,) = folder.glob("vtpm_cuse-*.whl")
    return wheel
