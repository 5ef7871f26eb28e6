"""What `vtpmd` may still do once it serves, before it begins anew and behind that."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from tests.support.sockets import environment
from tests.support.vtpmd import begin_anew, running
from vtpm_cuse.client.manager import Manager
from vtpm_cuse.service.confine import landlock

NEEDED: Final = 0b1110_1011
"""CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_FOWNER, CAP_KILL, CAP_SETGID, CAP_SETUID."""
CONFINED: Final = """
import ctypes, os, sys
from vtpm_cuse.fleet.manager import confinement
from vtpm_cuse.fleet.manager.manager import Settings
folder = sys.argv[1]
confinement.enter(Settings(f"{folder}/state", f"{folder}/run"))
libc = ctypes.CDLL(None, use_errno=True)
os.chdir(folder)
"""


def rights_of(process: int) -> tuple[str, str, bool]:
    lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    found = {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}
    caps = [int(found[f"Cap{name}"], 16) for name in ("Eff", "Prm", "Bnd")]
    narrow = all(one & ~NEEDED == 0 for one in caps[: 3 if os.geteuid() == 0 else 2])
    return found["Seccomp"], found["NoNewPrivs"], narrow


def test_a_manager_is_shut_in_and_stays_so(tmp_path: Path) -> None:
    with running(tmp_path) as daemon:
        assert rights_of(daemon.process.pid) == ("2", "1", True)
        begin_anew(daemon)
        daemon.wait_for_it(60)
        with Manager(str(daemon.path)) as manager:
            manager.create("one")
            manager.start("one")
            manager.stop("one")
            manager.snapshot("one", "first")  # which goes from one folder to another
        assert rights_of(daemon.process.pid) == ("2", "1", True)
        assert daemon.end() == 0
        assert "rror" not in daemon.said


@pytest.mark.parametrize(
    ("attempt", "error"),
    [
        ("open('other', 'x')", "Permission denied"),
        ("os.mkdir('folder')", "Permission denied"),
        ("os.rename('state', 'other')", "Permission denied"),
        ("os.unlink('kept')", "Permission denied"),
        ("os.symlink('/etc', 'state/link')", "Permission denied"),
        (
            "sys.exit(os.strerror(ctypes.get_errno()) if libc.unshare(0x20000) else 0)",
            "not permitted",
        ),
        ("open('kept').read(), open('state/file', 'x'), os.rename('state/file', 'run/file')", ""),
        ("sys.exit(os.waitstatus_to_exitcode(os.system('true > /dev/null')))", ""),
    ],
    ids=["file", "folder", "rename", "unlink", "link", "unshare", "own", "program"],
)
def test_what_it_can_do(tmp_path: Path, attempt: str, error: str) -> None:
    try:
        if landlock.version() < landlock.REFERS_SINCE:
            pytest.skip("there is no Landlock, or an old one")
    except landlock.LandlockMissing:
        pytest.skip("there is no Landlock")
    (tmp_path / "kept").write_text("")
    words = [sys.executable, "-c", CONFINED + attempt, str(tmp_path)]
    environment_ = {**environment(), "TMPDIR": str(tmp_path / "run")}
    done = subprocess.run(words, capture_output=True, text=True, env=environment_)
    assert (done.returncode != 0) == bool(error), done.stderr
    assert error in done.stderr
