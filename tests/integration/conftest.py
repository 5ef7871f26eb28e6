"""What tests of several files stand on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

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
