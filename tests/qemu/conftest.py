"""Virtual machines with a TPM for the tests in this folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.qemu.fleet import KINDS, Booted, Fleet, Kind
from tests.qemu.guest import find_kernel
from tests.qemu.machine import QEMU

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """All machines."""
    folder = tmp_path_factory.mktemp("qemu")
    kernel = find_kernel(folder)
    if QEMU is None:
        pytest.skip("needs qemu-system-x86")
    if kernel is None:
        pytest.skip("needs Debian's kernel: kernel-helpers/lab --prepare")
    with Fleet(kernel, folder) as fleet:
        yield fleet


@pytest.fixture(params=KINDS, ids=str)
def kind(request: pytest.FixtureRequest) -> Kind:
    """Each kind of TPM."""
    kind: Kind = request.param
    return kind


@pytest.fixture
def booted(fleet: Fleet, kind: Kind) -> Booted:
    """A booted machine of each kind, shared by all tests."""
    return fleet.booted(kind)
