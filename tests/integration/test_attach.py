"""What `vtpm attach` prints, in the hands of QEMU: its machine has that TPM of the manager's."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from typing import TYPE_CHECKING, Final

import pytest

from tests.support.fuse import needs_fuse
from tests.support.vtpm_run import VTPM
from tests.support.vtpmd import running
from tests.support.waiting import PATIENCE_SECONDS, wait_until
from vtpm_cuse.client.manager import Manager

if TYPE_CHECKING:
    from pathlib import Path

QEMU: Final = shutil.which("qemu-system-x86_64")
MACHINE: Final = ("-machine", "q35", "-nodefaults", "-S", "-display", "none", "-qmp", "stdio")

pytestmark = pytest.mark.skipif(QEMU is None, reason="needs qemu-system-x86")


@pytest.mark.parametrize(
    ("interface", "model", "then"),
    [("socket", "tpm-crb", "stopped"), ("fuse", "tpm-tis", "awake")],
)
def test_a_machine_has_it(interface: str, model: str, then: str, tmp_path: Path) -> None:
    needs_fuse()
    words = ("--user", "--idle", "3600")
    with running(tmp_path, *words) as daemon, Manager(str(daemon.path)) as manager:
        manager.create("one", interface=interface)
        manager.start("one")
        asked = (*VTPM, "attach", "--socket", str(daemon.path), "one")
        told = subprocess.run(asked, check=True, capture_output=True, text=True).stdout
        orders = ("qmp_capabilities", "query-tpm", "quit")
        done = subprocess.run(
            [str(QEMU), *MACHINE, *shlex.split(told)],
            check=False,
            input="".join(json.dumps({"execute": order}) for order in orders),
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
        )
        assert done.returncode == 0, done.stderr
        said = [json.loads(line).get("return") for line in done.stdout.splitlines()]
        assert [[tpm["model"] for tpm in found] for found in said if found] == [[model]]
        wait_until(lambda: manager.describe("one").state == then, then)
        if then == "awake":
            manager.hibernate("one")
            assert manager.describe("one").counters["commands"] > 0
        assert daemon.end() == 0
