"""Kernels of other machines, for the guests in ``tests/qemu``: Debian's, with a busybox for each.

The lists of packages are apt's, in a folder of our own: this system's dpkg is not told of other
architectures. apt checks what it fetches by Debian's keys.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final, NamedTuple

from tools.steps import CACHE, fail, run_main

if TYPE_CHECKING:
    from collections.abc import Mapping

FOLDER: Final = CACHE / "guests"
KERNEL: Final = "kernel"
BUSYBOX: Final = "busybox"
_KEYRING: Final = "/usr/share/keyrings/debian-archive-keyring.gpg"


class _Guest(NamedTuple):
    """What is taken of Debian's kernel.

    Attributes:
        package: Depends on the newest.
        modules: That its TPM needs, in the order in which they are loaded.
    """

    package: str
    modules: tuple[str, ...] = ()


# Debian's other kernels for arm64 have no driver of a TPM in memory.
_GUESTS: Final = {
    "arm64": _Guest("linux-image-cloud-arm64", ("tpm_tis_core", "tpm_tis")),
    "ppc64el": _Guest("linux-image-powerpc64le"),
}


def main() -> None:
    """Fetches those that are missing: about 90 MB for all."""
    missing = [name for name in _GUESTS if not (FOLDER / name).exists()]
    if not missing:
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as name:
        work = Path(name).absolute()
        environment = _configure(work, missing)
        _run("apt-get", "-q", "update", environment=environment)
        for architecture in missing:
            packages, guest = work / f"{architecture}.packages", work / architecture
            packages.mkdir()
            guest.mkdir()
            _fetch(architecture, packages, environment)
            for package in packages.glob("*.deb"):
                _unpack(package, guest, _GUESTS[architecture].modules)
            guest.rename(FOLDER / architecture)


def _configure(work: Path, architectures: list[str]) -> Mapping[str, str]:
    """An apt that knows these architectures alone; returns the environment that makes it so."""
    ours = ("Created-By: Packages", "Origin: Debian", "Component: main")
    repositories = _ask("apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE)", *ours)
    if not repositories:
        fail("apt knows no packages of Debian: sudo apt-get update")
    options = f"[arch={','.join(architectures)} signed-by={_KEYRING}]"
    (work / "sources.list").write_text(
        "".join(f"deb {options} {line} main\n" for line in sorted(set(repositories.splitlines())))
    )
    for folder in ("lists/partial", "archives/partial"):
        (work / folder).mkdir(parents=True)
    (work / "status").touch()
    (work / "apt.conf").write_text(
        f"""\
APT::Architectures {{ {"".join(f'"{name}"; ' for name in architectures)}}};
APT::Sandbox::User "root";
Dir::State "{work}";
Dir::State::status "{work}/status";
Dir::Cache "{work}";
Dir::Etc::sourcelist "{work}/sources.list";
Dir::Etc::sourceparts "-";
"""
    )
    return {**os.environ, "APT_CONFIG": str(work / "apt.conf"), "LC_ALL": "C"}


def _fetch(architecture: str, packages: Path, environment: Mapping[str, str]) -> None:
    package = f"{_GUESTS[architecture].package}:{architecture}"
    depends = _ask("apt-cache", "depends", "--important", package, environment=environment)
    found = re.search(r"Depends: (linux-image-[0-9][^\s:]+)", depends)
    if found is None:
        fail(f"apt knows no package {package}")
    wanted = [f"{name}:{architecture}" for name in (found[1], "busybox-static")]
    _run("apt-get", "-q", "download", *wanted, folder=packages, environment=environment)


def _unpack(package: Path, guest: Path, modules: tuple[str, ...]) -> None:
    """Writes what the guest needs into its folder; modules have their order in their names."""
    command = ("dpkg-deb", "--fsys-tarfile", package)
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE) as unpacking,
        tarfile.open(fileobj=unpacking.stdout, mode="r|") as archive,
    ):
        for member in archive:
            path = PurePosixPath(member.name)
            if path.match("boot/vmlinu?-*"):
                target = KERNEL
            elif path.match("bin/busybox"):
                target = BUSYBOX
            elif path.suffix == ".ko" and path.stem in modules:
                target = f"{modules.index(path.stem)}-{path.name}"
            else:
                continue
            file = archive.extractfile(member)
            if file is not None:
                (guest / target).write_bytes(file.read())
    if unpacking.returncode:
        fail(f"{package.name} cannot be unpacked")


def _ask(*command: str, environment: Mapping[str, str] | None = None) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def _run(*command: str, environment: Mapping[str, str], folder: Path | None = None) -> None:
    if subprocess.run(command, cwd=folder, env=environment, check=False).returncode:
        fail(f"{' '.join(command)} failed: is there a network?")


if __name__ == "__main__":
    run_main(main)
