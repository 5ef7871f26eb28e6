"""What all tests of units stand on."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

import tests.support.untimed  # noqa: F401
from vtpm_cuse.cli.vtpm import vtpm

if TYPE_CHECKING:
    from tests.support.programs import Run


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs the program ``vtpm`` in this process."""

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vtpm", *words])
        status = vtpm.main()
        return status, *capfd.readouterr()

    return call
