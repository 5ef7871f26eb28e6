"""The TPM's second file in a FUSE mount: each open has a TPM of its own."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from tests.device.managed import *  # noqa: F403
from tests.device.managed_crowd import *  # noqa: F403
from tests.device.managed_hostile import *  # noqa: F403
from tests.device.managed_semantics import *  # noqa: F403
from tests.device.managed_view import *  # noqa: F403
from tests.device.managed_view import vtpm
from tests.kernel.harness import errno_from, servers
from tests.support.commands import get_random
from tests.support.fuse import FuseServer, needs_fuse
from tests.support.managed_device import DeviceWorld

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def world(tmp_path: Path) -> Iterator[DeviceWorld]:
    needs_fuse()
    for make in servers(tmp_path, FuseServer):
        server = make("vtpm0").start()
        yield DeviceWorld(server, server.device.with_name("vtpmrm0"))


def test_a_tpm_1_2_has_none(tmp_path: Path) -> None:
    needs_fuse()
    for make in servers(tmp_path, FuseServer):
        server = make("vtpm0", tpm2=False, more=("--tpm12",)).start()
        assert not server.device.with_name("vtpmrm0").exists()


def test_a_client_keeps_nobody_from_ending_the_tpm(world: DeviceWorld) -> None:
    with world.client() as client:
        assert len(client.command(get_random(8))) == 20
        world.server.stop()
        assert errno_from(lambda: client.send(get_random(8))) in {
            errno.ENOTCONN,
            errno.ECONNABORTED,
        }


def test_a_client_is_told_of_no_others(world: DeviceWorld) -> None:
    done = vtpm("clients", str(world.managed))
    assert (done.returncode, done.stdout) == (1, "")
    assert "the clients' own device" in done.stderr or "nor a TPM" in done.stderr
