"""/dev/vtpmrmN beside /dev/vtpmN: each open has a TPM of its own."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.device.managed import *  # noqa: F403
from tests.device.managed import clients, opened
from tests.device.managed_semantics import *  # noqa: F403
from tests.device.managed_view import *  # noqa: F403
from tests.kernel.harness import SWTPM_CUSE, errno_from, run
from tests.support import managed as m
from tests.support.commands import code_of
from tests.support.managed_device import DeviceWorld

if TYPE_CHECKING:
    from tests.kernel.conftest import Serve

pytestmark = pytest.mark.usefixtures("warm")


@pytest.fixture
def world(serve: Serve) -> DeviceWorld:
    server = serve("vtpm7", more=("--resource-manager",)).start()
    return DeviceWorld(server, Path("/dev/vtpmrm7"))


def test_both_go_with_the_server(serve: Serve) -> None:
    server = serve("vtpm7", more=("--resource-manager=tpms/shared",)).start()
    managed = Path("/dev/tpms/shared")
    assert stat.S_ISCHR(os.stat(managed).st_mode)
    server.stop()
    assert not managed.exists()


def test_limits_of_a_user_and_of_a_client(serve: Serve) -> None:
    limits = ("--managed-limits", "clients-of-a-user=2,objects=4,sessions=3")
    world = DeviceWorld(
        serve("vtpm7", more=("--resource-manager", *limits)).start(), Path("/dev/vtpmrm7")
    )
    with clients(world, 2) as there:
        assert errno_from(lambda: world.client().__exit__()) == errno.EMFILE
        for client in there:
            for number in range(4):
                opened(client, m.load_external(number))
            for _ in range(3):
                opened(client, m.start_session())
            assert code_of(client.command(m.load_external(4))) == 0xB0902
            assert code_of(client.command(m.start_session())) == 0xB0903


def test_a_name_that_is_taken(serve: Serve) -> None:
    first = serve("vtpm7", more=("--resource-manager",)).start()
    second = serve("vtpm8", more=("--resource-manager=vtpmrm7",))
    second.fails(255, "A device '/dev/vtpmrm7' already exists")
    assert not second.device.exists()
    first.stop()
    second.start()


def test_one_name_for_both() -> None:
    done = run(
        *(
            SWTPM_CUSE,
            "-n",
            "vtpm7",
            "--tpm2",
            "--tpmstate",
            "dir=/tmp",
            "--resource-manager=vtpm7",
        ),
        status=None,
    )
    assert done.status != 0
    assert "'vtpm7' cannot be the name of both devices" in done.stderr


def test_a_tpm_1_2_has_none() -> None:
    words = ("-n", "vtpm7", "--tpmstate", "dir=/tmp", "--resource-manager")
    done = run(SWTPM_CUSE, *words, status=None)
    assert done.status != 0
    assert "give --tpm2" in done.stderr
