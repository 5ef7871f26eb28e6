"""Every one of tpm2-tools on the managed file of a FUSE mount, never flushing, in sessions."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from tests.kernel.harness import PATIENCE, needs, servers
from tests.support.fuse import FuseServer, needs_fuse
from tests.support.managed import NO_ROOM
from tests.support.setups import OURS, make_workshop
from tests.support.tpm2_sessions import PRELUDE, SCENARIOS

if TYPE_CHECKING:
    from collections.abc import Iterator

NOT_OF_THE_PACKAGE: Final = frozenset({"tpm2_ptool"})
"""Of tpm2-pkcs11."""


@pytest.fixture(scope="module")
def tcti(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a TPM with a certificate from its set-up, which all sessions here share."""
    needs_fuse()
    needs(shutil.which("tpm2_getrandom") is not None, "tpm2-tools are missing")
    folder = tmp_path_factory.mktemp("tpm")
    workshop = make_workshop(folder)
    state = workshop.new_state("state")
    words = ("--tpm2", "--tpm-state", state, "--create-ek-cert", "--pcr-banks", "sha1,sha256")
    done = workshop.run(OURS, *words)
    assert done.returncode == 0, done
    for make in servers(folder, FuseServer):
        server = make("vtpm0", state=state).start()
        yield f"device:{server.device.with_name('vtpmrm0')}"


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_session_that_flushes_nothing(name: str, tcti: str, tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", "-c", PRELUDE + SCENARIOS[name]],
        cwd=tmp_path,
        env={**os.environ, "TPM2TOOLS_TCTI": tcti},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=PATIENCE,
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert not NO_ROOM.search(said), said


def test_no_program_is_missing() -> None:
    needs(shutil.which("tpm2_getrandom") is not None, "tpm2-tools are missing")
    there = {path.name for path in Path("/usr/bin").glob("tpm2_*")} - NOT_OF_THE_PACKAGE
    scripts = (script.replace("\\\n", "").strip() for script in SCENARIOS.values())
    several = [script for script in scripts if len(script.splitlines()) >= 2]  # steps
    used = set(re.findall(r"\btpm2_\w+", "\n".join([PRELUDE, *several])))
    assert len(there) > 90
    assert there == used
