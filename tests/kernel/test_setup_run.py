"""``./setup run`` picks the best device: CUSE first, the kernel's vTPM proxy without it."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.kernel.harness import ROOT, run

pytestmark = pytest.mark.skipif(
    "LAB_SCRATCH" not in os.environ, reason="it hides /dev/cuse, so in the lab alone"
)


def run_once(folder: Path) -> str:
    done = run(ROOT / "setup", "run", "--once", "vtpmonce", env={"XDG_STATE_HOME": str(folder)})
    assert "BEGIN PUBLIC KEY" in done.stdout
    assert "The TPM has ended, " in done.stdout
    assert "is a TPM 2.0, whose state is in /var/lib/vtpm-cuse/vtpmonce." in done.stderr
    assert Path("/var/lib/vtpm-cuse/vtpmonce/tpm2-00.permall").exists()
    assert not list(folder.iterdir())
    return done.stderr


def test_cuse(tmp_path: Path) -> None:
    said = run_once(tmp_path)
    assert said.startswith("setup: device: /dev/vtpmonce through CUSE, which this kernel has\n")
    assert not os.path.exists("/dev/vtpmonce")


def test_proxy_without_cuse(tmp_path: Path) -> None:
    os.rename("/dev/cuse", "/dev/cuse-hidden")
    try:
        said = run_once(tmp_path)
        assert not os.path.exists("/dev/cuse")
    finally:
        os.rename("/dev/cuse-hidden", "/dev/cuse")
    found = re.match(r"setup: device: (/dev/tpmrm[0-9]+) through the kernel's vTPM proxy, ", said)
    assert found, said
    assert "because this machine has no CUSE (/dev/cuse: No such file or directory)" in said
    assert not os.path.exists(found[1])
