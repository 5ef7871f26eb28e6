"""What the life of a vTPM is said to be."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest

from vtpm_cuse.config import StateConfig, VtpmConfig
from vtpm_cuse.service import life

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("scheme", ["dir", "file", "mem"])
def test_it_is_said_where_the_state_is(
    scheme: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = "" if scheme == "mem" else str(tmp_path / "x")
    state = StateConfig(f"{scheme}://{place}")
    with caplog.at_level(logging.INFO):
        life.introduce("/dev/x", VtpmConfig(tpm2=True, state=state))
    assert caplog.messages == [f"/dev/x is a TPM 2.0, whose state is in {place or 'memory'}."]
