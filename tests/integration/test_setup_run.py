"""``./setup run`` on this machine; with the devices of the lab: tests/kernel/test_setup_run.py."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

TREE = Path(__file__).parents[2]


def shown(words: list[str], before: tuple[str, ...] = (), **variables: str) -> tuple[str, str]:
    """Output and messages of ``./setup run``, which must go well."""
    done = subprocess.run(
        [*before, TREE / "setup", "run", *words],
        env={**os.environ, **variables},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done
    return done.stdout, done.stderr


def run_once(folder: Path, *before: str, **variables: str) -> tuple[str, str]:
    """Runs it with one TPM; gives output and messages."""
    output, said = shown(["--once", "vtpmonce"], before, XDG_STATE_HOME=str(folder), **variables)
    assert "BEGIN PUBLIC KEY" in output
    assert "The TPM has ended, " in output
    return output, said


def slow_to_unmount(folder: Path) -> Path:
    """A folder of programs in which fusermount3 takes its time, as it does on a busy machine."""
    programs = folder / "programs"
    programs.mkdir()
    file = programs / "fusermount3"
    real = shutil.which("fusermount3")
    file.write_text(f'#!/bin/sh\n[ "$1" != -u ] || sleep 0.5\nexec {real} "$@"\n')
    file.chmod(0o755)
    return programs


@pytest.mark.skipif(os.path.exists("/dev/cuse"), reason="this machine has CUSE")
@pytest.mark.skipif(os.path.exists("/dev/vtpmx"), reason="this machine has the vTPM proxy")
def test_file_by_fuse_where_there_is_no_device(tmp_path: Path) -> None:
    before = set(os.listdir("/dev"))
    _, said = run_once(tmp_path, PATH=f"{slow_to_unmount(tmp_path)}:{os.environ['PATH']}")
    file = tmp_path / "vtpm-cuse/vtpmonce.mount/vtpmonce"
    assert said.startswith(f"setup: device: {file}, a file in a FUSE mount, because ")
    assert "no CUSE (/dev/cuse: " in said
    assert "no vTPM proxy (/dev/vtpmx: " in said
    assert not file.exists()
    assert str(tmp_path) not in Path("/proc/mounts").read_text()
    assert (tmp_path / "vtpm-cuse/vtpmonce/tpm2-00.permall").exists()
    # To look whether a device is there must not make one.
    assert not {"cuse", "vtpmx"} & (set(os.listdir("/dev")) - before)


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root, to hide /dev/fuse")
@pytest.mark.skipif(os.path.exists("/dev/cuse"), reason="this machine has CUSE")
@pytest.mark.skipif(os.path.exists("/dev/vtpmx"), reason="this machine has the vTPM proxy")
def test_kernel_lab_where_there_is_nothing(tmp_path: Path) -> None:
    file = tmp_path / "no-fuse"
    file.touch()
    hide = f'mount --bind "{file}" /dev/fuse && exec "$@"'
    _, said = run_once(tmp_path, "unshare", "--mount", "sh", "-c", hide, "sh")
    assert said.startswith("setup: device: /dev/vtpmonce in the kernel lab, because ")
    assert "no FUSE (/dev/fuse: Not a device)" in said
    assert (tmp_path / "vtpm-cuse/vtpmonce/tpm2-00.permall").exists()


def test_many_of_one_manager(tmp_path: Path) -> None:
    output, said = shown(["--fleet", "2"], TMPDIR=str(tmp_path))
    names = ["tpm0001", "tpm0002"]
    used = re.findall(r"^(tpm\d+): 8 random bytes: [0-9a-f]{16}$", output, re.MULTILINE)
    assert used == re.findall(r"^(tpm\d+) +a\w+ ", output, re.MULTILINE) == names
    assert "all of them have ended, in order" in said
    assert os.listdir(tmp_path) == []
