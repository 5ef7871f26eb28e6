"""What tests of several files stand on."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.support import debian
from tests.support.private import runtime_folder
from tests.support.setups import Workshop, make_workshop
from tests.support.vtpm_run import place_of_its_own

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.vtpm_run import Place


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    """A folder for swtpm_setup, with a configuration of its own."""
    return make_workshop(tmp_path)


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the sockets of private TPMs are; in the end there are none, nor a process."""
    with runtime_folder() as folder:
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
        yield folder


@pytest.fixture
def place() -> Iterator[Place]:
    """For `vtpm run`; in the end nothing may be in it."""
    with place_of_its_own() as found:
        yield found


@pytest.fixture(scope="session")
def debs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of our Debian packages."""
    if not (debian.ROOT / ".git").exists():
        pytest.skip("needs a checkout of git")
    folder = tmp_path_factory.mktemp("debian")
    debian.build(folder)
    return folder


@pytest.fixture(scope="module")
def bare_system(debs: Path, tmp_path_factory: pytest.TempPathFactory) -> debian.System:
    """This Debian, with Debian's swtpm, to install them in."""
    if os.geteuid() != 0:
        pytest.skip("needs root, for mount")
    made = debian.System(tmp_path_factory.mktemp("system"), debs)
    entered = made.run("true")
    if entered.returncode:
        pytest.skip(f"no system over this one: {entered.stderr.strip()}")
    return made
