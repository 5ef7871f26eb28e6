"""Virtual machines with a TPM for the tests in this folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.qemu.fleet import BOOTED, KINDS, Booted, Fleet, Kind

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """All machines."""
    with Fleet(tmp_path_factory.mktemp("qemu")) as fleet:
        yield fleet


@pytest.fixture(params=KINDS, ids=str)
def kind(request: pytest.FixtureRequest) -> Kind:
    """Each kind of TPM in the usual machine."""
    kind: Kind = request.param
    return kind


@pytest.fixture(params=BOOTED, ids=str)
def booted(fleet: Fleet, request: pytest.FixtureRequest) -> Booted:
    """A booted machine of each kind, shared by all tests."""
    return fleet.booted(request.param)
