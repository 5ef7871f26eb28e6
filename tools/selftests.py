"""The kernel's own tests of TPM spaces, from Debian's package of its source.

The kernel lab has no network, so ``./setup test`` unpacks them before.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from tools.steps import CACHE, fail, run_main

FOLDER: Final = CACHE / "selftests"
_TESTS: Final = "tools/testing/selftests/tpm2"


def main() -> None:
    """Unpacks them, unless they are there."""
    if FOLDER.exists():
        return
    depends = _output("apt-cache", "depends", "--important", "linux-source")
    found = re.search(r"Depends: (linux-source-[0-9]\S+)", depends)
    if found is None:
        fail("apt knows no package linux-source: sudo apt-get update")
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as name:
        work = Path(name)
        # Or apt warns that its own user may not write here.
        download = ("apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", found[1])
        if subprocess.run(download, cwd=work, check=False).returncode:
            fail(f"no {found[1]} to be had: is there a network? If so, sudo apt-get update")
        (package,) = work.glob("*.deb")
        _unpack(package, work, f"{found[1]}/{_TESTS}")
        shutil.move(work / found[1] / _TESTS, FOLDER)


def _output(*command: str) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def _unpack(package: Path, work: Path, folder: str) -> None:
    source = f"./usr/src/{folder.partition('/')[0]}.tar.xz"
    whole = subprocess.Popen(
        ("dpkg-deb", "--fsys-tarfile", package.name), cwd=work, stdout=subprocess.PIPE
    )
    archive = subprocess.Popen(
        ("tar", "-xO", source), cwd=work, stdin=whole.stdout, stdout=subprocess.PIPE
    )
    tree = subprocess.run(("tar", "-xJ", folder), cwd=work, stdin=archive.stdout, check=False)
    if tree.returncode or archive.wait() or whole.wait():
        fail(f"{package.name} cannot be unpacked, or {folder} is not in it")


if __name__ == "__main__":
    run_main(main)
