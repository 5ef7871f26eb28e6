"""Going to the background: the parent's exit status is the truth about the child."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

# Argument: what the child does. Descriptor argv[2]: where the child tells what it is.
_PROGRAM = """
import json, os, signal, sys
from vtpm_cuse.errors import FrontendError
from vtpm_cuse.service.process.daemon import run_in_background

what, report = sys.argv[1], int(sys.argv[2])

def serve(ready):
    if what == "status":
        sys.stderr.write("what went wrong\\n")
        return 42
    if what == "signal":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "exception":
        raise RuntimeError("a bug")
    if what == "refused":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    ready()
    if what == "refused":
        got = signal.sigwait({signal.SIGTERM})
        os.write(report, json.dumps({"signal": got}).encode())
        return 0
    os.write(report, json.dumps({
        "pid": os.getpid(), "session": os.getsid(0), "directory": os.getcwd(),
        "files": [os.readlink(f"/proc/self/fd/{fd}") for fd in range(3)],
    }).encode())
    return 0

def confirm(child):
    if what == "refused":
        raise FrontendError("it does not answer")
    print("confirmed", os.getpid(), flush=True)

parent = os.getpid()
try:
    status = run_in_background(serve, confirm)
except FrontendError as exc:
    print(exc, flush=True)
    try:
        os.waitpid(-1, os.WNOHANG)
        print("and has a child", flush=True)
    except ChildProcessError:
        status = 7
if os.getpid() == parent:
    print("parent", os.getpid(), flush=True)
sys.exit(status)
"""


def background(what: str, tmp_path: Path) -> tuple[subprocess.CompletedProcess[str], str]:
    """What became of the parent, and what the child said at its end."""
    read_end, write_end = os.pipe()
    try:
        parent = subprocess.run(
            [sys.executable, "-c", _PROGRAM, what, str(write_end)],
            check=False,
            capture_output=True,
            text=True,
            pass_fds=[write_end],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
            cwd=tmp_path,
        )
    finally:
        os.close(write_end)
    with open(read_end, encoding="ascii") as report:
        return parent, report.read()


def test_success(tmp_path: Path) -> None:
    parent, report = background("ready", tmp_path)
    assert parent.returncode == 0
    (line,) = parent.stdout.splitlines()  # and nothing after it: the parent ends at once
    child = json.loads(report)
    assert line.startswith("confirmed ")
    assert str(child["pid"]) not in line
    assert child["session"] == child["pid"]
    assert child["directory"] == "/"
    assert child["files"] == ["/dev/null"] * 3


@pytest.mark.parametrize(("what", "status"), [("status", 42), ("exception", 1)])
def test_failure_before_it_is_ready(tmp_path: Path, what: str, status: int) -> None:
    parent, report = background(what, tmp_path)
    assert parent.returncode == status
    assert "confirmed" not in parent.stdout
    assert "parent" in parent.stdout
    assert report == ""
    assert ("what went wrong" if what == "status" else "a bug") in parent.stderr


def test_death_before_it_is_ready(tmp_path: Path) -> None:
    parent, _ = background("signal", tmp_path)
    assert parent.returncode == -signal.SIGKILL


def test_device_that_does_not_answer(tmp_path: Path) -> None:
    """Whoever hears of it finds the device gone with the child."""
    parent, report = background("refused", tmp_path)
    assert parent.stdout.startswith("it does not answer\nparent ")
    assert parent.returncode == 7
    assert json.loads(report) == {"signal": signal.SIGTERM}
