"""The package's swtpm as a machine of libvirt's starts it, where AppArmor is enforced."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from tests.kernel.harness import PATIENCE, ROOT, needs, run, wait_until
from tests.support import commands as tpm
from tests.support.sockets import connect, listens

if TYPE_CHECKING:
    from collections.abc import Iterator

MACHINE: Final = "libvirt-3a8d7504-f8c9-4b96-8dba-78e5790938fd"
PROFILE: Final = f"""
abi <abi/3.0>,
include <tunables/global>
profile {MACHINE} flags=(attach_disconnected) {{
  include <abstractions/libvirt-qemu>
}}
"""
FOLDERS: Final = ("lib/libvirt/swtpm/one", "log/swtpm/libvirt/qemu", "lib/libvirt/images")
PACKAGES: Final = Path("/usr/lib/python3/dist-packages")
PROGRAM: Final = Path("/usr/bin/swtpm")


@pytest.fixture(scope="module")
def machine(cuse: None) -> Iterator[tuple[str, ...]]:
    """The words before a program that a machine starts, as the user of its TPM."""
    needs("LAB_SCRATCH" in os.environ, "only in the kernel lab: it changes the system")
    libvirt = Path("/etc/apparmor.d/abstractions/libvirt-qemu")
    needs(libvirt.exists(), "needs libvirt-daemon-system")
    if not os.path.ismount("/sys/kernel/security"):
        run("mount", "-t", "securityfs", "none", "/sys/kernel/security")
    shutil.copytree(ROOT / "vtpm_cuse", PACKAGES / "vtpm_cuse")
    before = PROGRAM.read_bytes()
    (words,) = (
        line
        for line in (ROOT / "debian/rules").read_text().splitlines()
        if line.startswith("PYTHON")
    )
    installed = (Path(sys.executable).parent / "swtpm").read_text().partition("\n")[2]
    PROGRAM.write_text(f"#!{words.partition('= ')[2]}\n{installed}")
    for name in FOLDERS:
        Path("/var", name).mkdir(parents=True, exist_ok=True)
        shutil.chown(Path("/var", name), "tss", "tss")
    run("apparmor_parser", "--replace", "--skip-cache", ROOT / "debian/usr.bin.swtpm")
    run("apparmor_parser", "--replace", "--skip-cache", stdin=PROFILE.encode())
    yield (
        "setpriv",
        "--reuid=tss",
        "--regid=tss",
        "--clear-groups",
        "aa-exec",
        "-i",
        "-p",
        MACHINE,
        "--",
    )
    run("apparmor_parser", "--remove", "--skip-cache", stdin=PROFILE.encode())
    run("apparmor_parser", "--remove", ROOT / "debian/usr.bin.swtpm")
    PROGRAM.write_bytes(before)
    shutil.rmtree(PACKAGES / "vtpm_cuse")


def test_a_machine_starts_its_tpm_and_nothing_else_of_it(machine: tuple[str, ...]) -> None:
    state, log = (f"/var/{name}" for name in FOLDERS[:2])
    path = Path(state, "socket")
    words = (
        *(*machine, str(PROGRAM), "socket", "--tpm2", "--tpmstate", f"dir={state},mode=0600"),
        *("--log", f"file={log}/one.log", "--flags", "startup-clear"),
        *("--server", f"type=unixio,path={path}"),
    )
    with subprocess.Popen(words) as process:
        try:
            wait_until(partial(listens, path), "swtpm listens", process=process, seconds=PATIENCE)
            current = Path(f"/proc/{process.pid}/attr/current").read_text().strip()
            assert current == "swtpm (enforce)"
            with connect(path) as client:
                assert tpm.code_of(client.command(tpm.get_random(8))) == 0
        finally:
            process.kill()
    assert Path(state, "tpm2-00.permall").stat().st_size > 0


def test_a_machine_cannot_reach_the_disk_of_another_by_it(machine: tuple[str, ...]) -> None:
    disk = Path("/var", FOLDERS[2], "disk")
    words = ("socket", "--tpm2", "--tpmstate", "backend-uri=mem://", "--server", "type=tcp,port=0")
    done = run(*machine, str(PROGRAM), *words, "--log", f"file={disk}", status=None)
    assert done.status != 0
    assert str(disk) in done.stderr
    assert "Permission denied" in done.stderr
    assert not disk.exists()
