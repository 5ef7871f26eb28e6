"""A manager that cannot begin says which folders it wanted, before it shuts itself in."""

from __future__ import annotations

import pytest

from vtpm_cuse.errors import FrontendError
from vtpm_cuse.fleet.manager import confinement
from vtpm_cuse.fleet.manager.manager import Settings


def test_folders_that_cannot_be_made_are_named() -> None:
    settings = Settings("/proc/nowhere/state", "/proc/nowhere/run")
    with pytest.raises(FrontendError, match=r"/proc/nowhere/state .*; choose others with --state"):
        confinement.enter(settings)
