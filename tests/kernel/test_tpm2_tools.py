"""tpm2-tools on the device of CUSE."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.device.tpm2_tools import *  # noqa: F403

if TYPE_CHECKING:
    from pathlib import Path

    from tests.kernel.conftest import Serve
    from tests.kernel.harness import Server

pytestmark = pytest.mark.usefixtures("warm")


@pytest.fixture(scope="module")
def server(module_serve: Serve) -> Server:
    server: Server = module_serve("vtpm0").start()
    return server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path
