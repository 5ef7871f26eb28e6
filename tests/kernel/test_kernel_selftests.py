"""The kernel's own tests of its TPM devices, on ours, by the names they expect."""

from __future__ import annotations

import os
import re
import shutil
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from tests.kernel.harness import ROOT, needs, run

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.kernel.conftest import Serve

pytestmark = pytest.mark.usefixtures("warm")

_UNPACKED: Final = ROOT / ".cache/selftests"
_OTHERWISE_RAW: Final = {
    "test_send_two_cmds",  # an answer that nobody fetched is dropped
    "test_too_short_cmd",  # the TPM itself refuses it
    "test_seal_with_auth",  # TPM_RC_RETRY is the client's to see
}
"""What the raw device does as the C suite's, and the kernel's does not."""
_RESULT: Final = re.compile(r"^(test_\w+) \(.*\) \.\.\. (\w+)$", re.MULTILINE)


@contextmanager
def _named(name: str, device: Path) -> Iterator[None]:
    link = Path("/dev") / name
    link.symlink_to(device)
    try:
        yield
    finally:
        link.unlink()


def _results(folder: Path, *classes: str) -> dict[str, str]:
    """What each test of the kernel's came to: "ok", "FAIL" or "ERROR"."""
    words = (f"tpm2_tests.{name}" for name in classes)
    done = run("/usr/bin/python3", "-m", "unittest", "-v", *words, cwd=folder, status=None)
    return dict(_RESULT.findall(done.stderr))


@pytest.mark.parametrize("named_tpm0", ["raw", "managed"])
def test_all(serve: Serve, tmp_path: Path, named_tpm0: str) -> None:
    needs(_UNPACKED.exists(), "run python3 -m tools.selftests, which ./setup test does")
    folder = shutil.copytree(_UNPACKED, tmp_path / "selftests")
    written = (folder / "tpm2_tests.py").read_text()
    server = serve("vtpm7", more=("--resource-manager",)).start()
    managed = Path("/dev/vtpmrm7")
    first = {"raw": server.device, "managed": managed}[named_tpm0]
    with ExitStack() as stack:
        for name, device in (("tpm0", first), ("tpmrm0", managed)):
            stack.enter_context(_named(name, device))
        results = _results(folder, "SmokeTest", "SpaceTest", "AsyncTest")
    assert set(results) == set(re.findall(r"def (test_\w+)", written))
    failed = {name for name, result in results.items() if result != "ok"}
    assert failed == (_OTHERWISE_RAW if named_tpm0 == "raw" else set())
    assert os.listdir("/dev").count("tpm0") == 0
