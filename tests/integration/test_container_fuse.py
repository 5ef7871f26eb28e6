"""podman and a TPM of a user's own manager: found by its name, kept, or removed with its container."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import TYPE_CHECKING, Final

import pytest

from tests.support import commands as tpm
from tests.support.vtpmd import running
from tests.support.waiting import PATIENCE_SECONDS
from vtpm_cuse.client.manager import Manager
from vtpm_cuse.errors import FleetError

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("podman") is None or shutil.which("runc") is None,
    reason="needs root, podman and runc",
)

# Its own /run, in which the documents are, and this machine's programs as image.
SURROUNDINGS: Final = """
cd "$1" && shift && mkdir -p image && mount --make-rprivate / && mount --bind / image &&
mount -t tmpfs none /run && mkdir /run/cdi && mount --bind cdi /run/cdi || exit 77
exec podman --runtime runc --cgroup-manager cgroupfs --storage-driver vfs --root /run/root \
    --runroot /run/runroot --tmpdir /run/tmp run --rm --network none \
    --ulimit nofile=1024:1024 --ulimit nproc=1024:1024 "$@" --rootfs "$PWD/image" \
    sh -c 'tpm2_pcrextend 10:sha256='$(printf %064d 7)' && ls /dev/tpm*'
"""


def contained(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A container that extends a PCR."""
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", SURROUNDINGS, "sh", str(folder), *words],
        check=False,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode == 77 or "hybrid mode" in done.stderr:
        pytest.skip(f"no container can be made here: {done.stderr}")
    return done


def test_a_container_has_the_tpm_that_it_names(tmp_path: Path) -> None:
    (tmp_path / "cdi").mkdir()
    words = ("--user", "--idle", "3600", "--cdi", str(tmp_path / "cdi"))
    with running(tmp_path, *words) as daemon, Manager(str(daemon.path)) as manager:
        manager.create("web1", interface="fuse", cdi="keep")
        one = manager.start("web1")
        done = contained(tmp_path, "--device", "vtpm-cuse.org/vtpm=web1")
        assert (done.returncode, done.stdout) == (0, "/dev/tpm0\n/dev/tpmrm0\n"), done.stderr
        assert one.managed_device is not None
        with open(one.managed_device, "r+b", buffering=0) as device:
            device.write(tpm.pcr_read(10))
            assert tpm.pcr_value(device.read(4096)) != bytes(32)
        manager.update("web1", cdi="remove")
        done = contained(tmp_path, "--device", f"vtpm-cuse.org/vtpm={one.id}")
        assert done.returncode == 0, done.stderr
        with pytest.raises(FleetError, match="web1"):
            manager.describe("web1")
        assert "unresolvable" in contained(tmp_path, "--device", "vtpm-cuse.org/vtpm=web1").stderr
        assert daemon.end() == 0
