"""Where /proc is not mounted: what needs it says so, and nothing else is blamed."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Final

import pytest

from tests.support import sockets as s
from tests.support.waiting import PATIENCE_SECONDS

if TYPE_CHECKING:
    from pathlib import Path

_MAIN: Final = "import sys; from vtpm_cuse.cli.{} import main; sys.exit(main())"
_SAID: Final = "/proc is not mounted; mount -t proc proc /proc"


def below(hiding: str, program: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs a program in a mount namespace of its own, after the shell commands *hiding*."""
    run = subprocess.run(
        [
            *("unshare", "-m", "sh", "-c", f'{hiding} || exit 77; exec "$@"', "sh"),
            *(sys.executable, "-c", _MAIN.format(program), *words),
        ],
        check=False,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        env=s.environment(),
    )
    if run.returncode == 77 or run.stderr.startswith("unshare:"):
        pytest.skip("no right to mount")
    return run


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (
            "swtpm",
            ("socket", "--tpm2", "--tpmstate", "dir={}", "--server", "type=unixio,path={}/s"),
        ),
        ("swtpm", ("fuse", "-n", "vtpm0", "--mount", "{}/mount", "--tpmstate", "dir={}")),
        ("setup.swtpm_setup", ("--tpm2", "--tpm-state", "{}")),
    ],
    ids=["socket", "fuse", "setup"],
)
def test_programs_name_what_is_missing(
    program: str, words: tuple[str, ...], tmp_path: Path
) -> None:
    run = below("umount -l /proc", program, *(word.format(tmp_path) for word in words))
    assert run.returncode != 0
    said = run.stdout + run.stderr
    assert _SAID in said
    assert "SELinux" not in said
    assert "Traceback" not in said
    assert not (tmp_path / "tpm2-00.permall").exists()


def test_doctor_begins_with_it() -> None:
    run = below("umount -l /proc", "swtpm", "doctor")
    first, command, *_ = run.stdout.splitlines()
    assert first.split(maxsplit=2) == ["-", "/proc", "/proc is not mounted"]
    assert command.split() == ["->", "sudo", "mount", "-t", "proc", "proc", "/proc"]
    assert "apt-get install libtpms0" not in run.stdout
    assert run.stdout.rstrip().endswith("sudo mount -t proc proc /proc")


def test_another_device_as_fuse(tmp_path: Path) -> None:
    run = below(
        "mount --bind /dev/null /dev/fuse", "swtpm", "fuse", "-n", "vtpm0",
        "--mount", f"{tmp_path}/mount", "--tpmstate", f"dir={tmp_path}",
    )  # fmt: skip
    assert run.returncode != 0
    assert "/dev/fuse is something else than the kernel's device" in run.stderr
