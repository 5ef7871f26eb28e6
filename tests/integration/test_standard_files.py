"""Programs whose caller has closed their standard files, or has them on a full disk."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.support.programs import module_of
from tests.support.sockets import OURS, RUNNING, SHUTDOWN, Server, environment, u32
from tests.support.waiting import PATIENCE_SECONDS

if TYPE_CHECKING:
    from pathlib import Path

CLOSED = ("sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh")
PROGRAMS = (
    *("swtpm", "swtpm_cuse", "swtpm_ioctl", "swtpm_bios"),
    *("swtpm_cert", "swtpm_localca", "swtpm_setup"),
)


def run(script: str, program: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs *program* by a shell's *script*, where "$@" stands for it."""
    code = f"import sys; from {module_of(program)} import main; sys.exit(main())"
    return subprocess.run(
        ["sh", "-c", script, "sh", sys.executable, "-c", code, *words],
        check=False,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        text=True,
        env={**environment(), "PYTHONUNBUFFERED": ""},
        timeout=PATIENCE_SECONDS,
    )


def test_no_message_goes_into_the_state(tmp_path: Path) -> None:
    state = tmp_path / "linear"
    words = ("--tpmstate", f"backend-uri=file://{state}", "--log", "level=2", *RUNNING)
    with Server(tmp_path, *words, program=(*CLOSED, *OURS)) as server:
        assert server.request(99) == u32(10)  # unknown, and the log says so
        assert server.request(SHUTDOWN) == u32(0)
        assert server.wait() == 0
    assert state.read_bytes()[:8] == b"nilmptws"
    with Server(tmp_path / "again", *words) as server:
        assert server.request(SHUTDOWN) == u32(0)
        assert server.wait() == 0


@pytest.mark.parametrize("program", PROGRAMS)
def test_closed_output_is_no_error(program: str) -> None:
    for script in ('exec "$@" >&-', 'exec "$@" <&- >&- 2>&-'):
        done = run(script, program, "--help")
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("program", PROGRAMS)
def test_errors_keep_their_status(program: str) -> None:
    status = run('exec "$@"', program).returncode
    assert status
    for script in ('exec "$@" 2>&-', 'exec "$@" <&- >&- 2>&-', 'exec "$@" 2>/dev/full'):
        done = run(script, program)
        assert (done.returncode, done.stderr) == (status, "")


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_full_disk_is_one_line(program: str) -> None:
    done = run('exec "$@" >/dev/full', program, "--help")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.endswith("No space left on device\n")


def test_data_from_closed_input_is_an_error(tmp_path: Path) -> None:
    with Server(tmp_path, *RUNNING) as server:
        target = str(server.control_address)
        done = run('exec "$@" <&-', "swtpm_ioctl", "-h", "-", "--unix", target)
    said = "Could not execute PTM_HASH_DATA: Bad file descriptor\n"
    assert (done.returncode, done.stderr) == (1, said)
