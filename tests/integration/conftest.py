"""What tests of several files stand on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.setups import Workshop, make_workshop

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    """A folder for swtpm_setup, with a configuration of its own."""
    return make_workshop(tmp_path)
