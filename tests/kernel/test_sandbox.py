"""The attacks from inside on the kernel of the lab, over sockets and over CUSE."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.integration.test_sandbox import (  # noqa: F401  the same tests on another kernel
    test_another_root,
    test_deadly,
    test_every_thread_has_no_rights,
    test_refused,
    test_runs_as_another_user,
)
from tests.support import sockets as s
from tests.support.attacks import REFUSED, attack, subverted
from tests.support.waiting import PATIENCE_SECONDS, wait_until
from vtpm_cuse.service import landlock

if TYPE_CHECKING:
    from collections.abc import Iterator

NAME = "vtpm-attacked"


@pytest.fixture
def victim(tmp_path: Path, cuse: None) -> Iterator[subprocess.Popen[bytes]]:
    """A subverted TPM on CUSE."""
    (tmp_path / "secret").touch()
    words = ["cuse", "-n", NAME, "--tpm2", "--tpmstate", f"dir={tmp_path / 'state'}"]
    process = subprocess.Popen(
        [*subverted(str(tmp_path / "secret")), *words, "--flags", "startup-clear", "--foreground"],
        env=s.environment(),
    )
    wait_until(Path(f"/dev/{NAME}").exists, "the device is there", process=process)
    yield process
    process.kill()
    process.wait()


def suffer(name: str) -> bytes:
    device = os.open(f"/dev/{NAME}", os.O_RDWR)
    try:
        os.write(device, attack(name))
        return os.read(device, 100)
    finally:
        os.close(device)


def test_this_kernel_has_landlock() -> None:
    assert landlock.version() >= 1


def test_refused_on_cuse(victim: subprocess.Popen[bytes]) -> None:
    for name, error in REFUSED.items():
        assert suffer(name) == f"refused: {error}".encode(), name
    assert suffer("nothing") == b"done"
    victim.send_signal(signal.SIGTERM)
    assert victim.wait(PATIENCE_SECONDS) == 0


def test_deadly_on_cuse(victim: subprocess.Popen[bytes]) -> None:
    with pytest.raises(OSError, match=r"abort|not connected|No such device|I/O error"):
        suffer("exec")
    assert victim.wait(PATIENCE_SECONDS) == -signal.SIGSYS
