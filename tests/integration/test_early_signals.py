"""A signal that comes while a program starts ends it: without a word, and nothing is left."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from functools import partial
from typing import TYPE_CHECKING, Final

import pytest

from tests.kernel.harness import PROGRAMS
from tests.support import sockets as s
from tests.support.fuse import needs_fuse
from tests.support.programs import INSTALLED
from tests.support.waiting import PATIENCE_SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ENDING: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
AGAIN: Final = 4
COMM_MAX: Final = 15  # of a name in /proc/PID/comm


def start(*words: str | Path) -> subprocess.Popen[bytes]:
    """Whatever the tests themselves were started with."""
    env = ["/usr/bin/env", "--default-signal=INT,TERM,HUP"]
    return subprocess.Popen([*env, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def as_soon_as(met: Callable[[], bool], process: subprocess.Popen[bytes]) -> bool:
    """Looks without a pause; false if the process has ended before."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not met():
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline
    return True


def ended(process: subprocess.Popen[bytes]) -> tuple[int, bytes]:
    try:
        _, said = process.communicate(timeout=PATIENCE_SECONDS)
    finally:
        process.kill()
    return process.returncode, said


def emulator(folder: Path, *words: str) -> subprocess.Popen[bytes]:
    folder.mkdir()
    (folder / "state").mkdir()
    state = ("--tpm2", "--tpmstate", f"dir={folder / 'state'}", "--pid", f"file={folder / 'pid'}")
    return start(PROGRAMS / "swtpm", *words, *state, "--flags", "not-need-init,startup-clear")


def sockets(folder: Path) -> tuple[str, ...]:
    control, data = (f"type=unixio,path={folder / name}" for name in "cs")
    return ("socket", "--ctrl", control, "--server", data)


@pytest.mark.parametrize("first", ["c", "s", "pid"])
@pytest.mark.parametrize("number", ENDING)
def test_a_tpm_on_sockets(first: str, number: signal.Signals, tmp_path: Path) -> None:
    for again in range(AGAIN):
        folder = tmp_path / str(again)
        process = emulator(folder, *sockets(folder))
        assert as_soon_as((folder / first).exists, process)
        process.send_signal(number)
        assert ended(process) == (0, b"")
        assert os.listdir(folder) == ["state"]


@pytest.mark.parametrize("number", ENDING)
def test_a_tpm_in_the_background(number: signal.Signals, tmp_path: Path) -> None:
    """Who started it is told that nothing was started, when nothing is left."""
    for again in range(AGAIN):
        folder = tmp_path / str(again)
        process = emulator(folder, *sockets(folder), "--daemon")
        assert as_soon_as((folder / "c").exists, process)
        process.send_signal(number)
        assert ended(process) == (-number, b"")
        assert os.listdir(folder) == ["state"]


@pytest.mark.parametrize("number", ENDING)
def test_a_tpm_in_a_mount(number: signal.Signals, tmp_path: Path) -> None:
    needs_fuse()
    for mounted in (False, True) * 2:
        folder = tmp_path / str(len(os.listdir(tmp_path)))
        mount = folder / "mount"
        process = emulator(folder, "fuse", "-n", "x", "--mount", str(mount), "--foreground")
        check_mount(folder, process, number, mounted=mounted, status=0)


@pytest.mark.parametrize("number", ENDING)
def test_a_tpm_in_a_mount_in_the_background(number: signal.Signals, tmp_path: Path) -> None:
    """Before it is mounted: soon after that, who started it has ended."""
    needs_fuse()
    for again in range(AGAIN // 2):
        folder = tmp_path / str(again)
        process = emulator(folder, "fuse", "-n", "x", "--mount", str(folder / "mount"))
        check_mount(folder, process, number, mounted=False, status=-number)


def check_mount(
    folder: Path,
    process: subprocess.Popen[bytes],
    number: signal.Signals,
    *,
    mounted: bool,
    status: int,
) -> None:
    mount = folder / "mount"
    assert as_soon_as(partial(is_mounted, mount) if mounted else mount.exists, process)
    process.send_signal(number)
    found, said = ended(process)
    assert found == status
    assert b"Traceback" not in said
    assert not is_mounted(mount)
    assert os.listdir(folder) == ["state"]


def is_mounted(path: Path) -> bool:
    """To ask the path itself would be to wait until it is served."""
    with open("/proc/self/mountinfo", encoding="utf-8") as table:
        return f" {path} " in table.read()


def is_python(process: subprocess.Popen[bytes], program: str) -> bool:
    """Whether the program has begun to import its parts: then it has its name."""
    with contextlib.suppress(OSError):
        if "python" in os.readlink(f"/proc/{process.pid}/exe"):
            with open(f"/proc/{process.pid}/comm", encoding="ascii") as name:
                return name.read() == f"{program[:COMM_MAX]}\n"
    return False


@pytest.mark.parametrize("program", INSTALLED)
def test_no_import_is_shown(program: str) -> None:
    seen = 0
    for again in range(AGAIN):
        process = start(PROGRAMS / program, "--help")
        # On a busy machine it may have ended before anybody looks.
        seen += as_soon_as(partial(is_python, process, program), process)
        for _ in range(again * 1000):  # a little later each time
            process.poll()
        process.send_signal(signal.SIGINT)
        status, said = ended(process)
        assert said == b""
        assert status in {-signal.SIGINT, 130, 0}
    assert seen


@pytest.mark.parametrize("number", ENDING)
def test_a_start_that_fails_says_why(number: signal.Signals, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    process = emulator(folder, *sockets(folder), "--flags", "startup-deactivated")
    as_soon_as((folder / "c").exists, process)  # it does not stay there for long
    process.send_signal(number)
    _, said = ended(process)
    assert b"Traceback" not in said
    assert os.listdir(folder) == ["state"]


def test_ignored_signals_stay_ignored(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    words = [*sockets(folder), "--tpm2", "--tpmstate", f"dir={tmp_path}"]
    code = "trap '' INT TERM; exec \"$@\""
    process = start("/bin/sh", "-c", code, "sh", PROGRAMS / "swtpm", *words)
    assert as_soon_as(partial(s.listens, folder / "c"), process)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    with s.connect(folder / "c") as client:
        assert client.control(s.GET_CAPABILITY, size=8)
    process.send_signal(signal.SIGHUP)
    assert ended(process) == (0, b"")
