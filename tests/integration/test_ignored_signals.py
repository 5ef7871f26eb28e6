"""What a caller has told the system to ignore is ignored: nohup, and a script's "&"."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Final

import pytest

from tests.kernel.harness import PROGRAMS, ROOT
from tests.support import sockets as s
from tests.support.fuse import SWTPM_FUSE, needs_fuse
from tests.support.waiting import PATIENCE_SECONDS, wait_until

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

ENDING: Final = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)


def ignoring(number: signal.Signals, words: Sequence[str | Path]) -> list[str]:
    """A command line that starts another with the signal ignored, as nohup does."""
    name = number.name.removeprefix("SIG")
    return ["/bin/sh", "-c", f"trap '' {name}; exec \"$@\"", "sh", *map(str, words)]


def is_ignored(pid: int, number: int) -> bool:
    with open(f"/proc/{pid}/status", encoding="ascii") as status:
        (mask,) = [int(line.split()[1], 16) for line in status if line.startswith("SigIgn:")]
    return bool(mask >> (number - 1) & 1)


@pytest.mark.parametrize("number", ENDING)
@pytest.mark.parametrize("interface", ["socket", "chardev", "fuse"])
def test_tpm_lives_on(interface: str, number: signal.Signals, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    (tmp_path / "state").mkdir()
    ours, theirs = os.openpty()
    own = {
        "socket": ["--ctrl", f"type=unixio,path={tmp_path / 'c'}"],
        "chardev": ["--fd", str(theirs)],
        "fuse": ["-n", "x", "--mount", str(tmp_path / "mount"), "--foreground"],
    }[interface]
    if interface == "fuse":
        needs_fuse()
    words = [SWTPM_FUSE[0], interface, "--tpm2", "--tpmstate", f"dir={tmp_path / 'state'}"]
    words += [*own, "--pid", f"file={pid_file}", "--log", f"file={tmp_path / 'log'}"]
    process = subprocess.Popen(ignoring(number, words), pass_fds=[theirs])
    try:
        wait_until(
            lambda: pid_file.exists() and pid_file.read_text() != "",
            "the pid file",
            process=process,
            log=tmp_path / "log",
        )
        process.send_signal(number)
        assert is_ignored(process.pid, number)
        other = next(other for other in ENDING if other != number)
        process.send_signal(other)
        assert process.wait(PATIENCE_SECONDS) == 0
        assert not pid_file.exists()
    finally:
        process.kill()
        process.wait()
        os.close(ours)
        os.close(theirs)


@pytest.mark.parametrize("number", ENDING)
def test_tpm_in_the_background_lives_on(number: signal.Signals, tmp_path: Path) -> None:
    pid_file, control = tmp_path / "pid", tmp_path / "c"
    words = [*s.OURS, "socket", "--tpm2", "--tpmstate", f"dir={tmp_path}", "--daemon"]
    words += ["--ctrl", f"type=unixio,path={control}", "--pid", f"file={pid_file}"]
    subprocess.run(ignoring(number, words), check=True, env=s.environment())
    pid = int(pid_file.read_text())
    os.kill(pid, number)
    assert is_ignored(pid, number)
    with s.connect(control) as client:
        assert client.control(s.GET_CAPABILITY, size=8)
        assert client.control(s.SHUTDOWN) == s.u32(0)


@pytest.mark.parametrize("number", ENDING)
def test_other_programs(number: signal.Signals, tmp_path: Path) -> None:
    """Each tells its own pid to itself, in the middle of its work."""
    (tmp_path / "state").mkdir()
    code = (
        "import os, signal, sys\n"
        "from vtpm_cuse.cli.setup import swtpm_setup\n"
        "from vtpm_cuse.manufacture import run\n"
        "begin = run._interruptible\n"
        "def interrupted(work, tpm, certifier):\n"
        "    def both():\n"
        f"        os.kill(os.getpid(), {int(number)})\n"
        "        work()\n"
        "    begin(both, tpm, certifier)\n"
        "run._interruptible = interrupted\n"
        "sys.exit(swtpm_setup.main())\n"
    )
    words = [sys.executable, "-c", code, "--tpm2", "--tpmstate", str(tmp_path / "state")]
    done = subprocess.run(
        ignoring(number, words), check=False, capture_output=True, text=True, env=s.environment()
    )
    assert done.returncode == 0, done
    assert (tmp_path / "state/tpm2-00.permall").exists()


def test_a_child_is_waited_for_all_the_same(tmp_path: Path) -> None:
    """With SIGCHLD ignored the kernel tells nobody how a child has ended."""
    words = [*s.OURS, "socket", "--tpm2", "--tpmstate", "dir=/no/such/folder", *s.RUNNING]
    words += ["--ctrl", f"type=unixio,path={tmp_path / 'c'}", "--daemon"]
    done = subprocess.run(
        ignoring(signal.SIGCHLD, words), check=False, capture_output=True, env=s.environment()
    )
    assert done.returncode == 1
    assert b"No such file or directory" in done.stderr
    assert b"child processes" not in done.stderr


@pytest.mark.parametrize("number", ENDING)
@pytest.mark.parametrize("program", ["setup", "kernel-helpers/demo", "kernel-helpers/lab"])
def test_helpers(program: str, number: signal.Signals, tmp_path: Path) -> None:
    """They ask for help only; what they have set up for signals by then is looked at."""
    path = ROOT / program
    if b"python3" in path.read_bytes().splitlines()[0]:
        code = (
            "import importlib.machinery, importlib.util, signal\n"
            f"loader = importlib.machinery.SourceFileLoader('helper', {str(path)!r})\n"
            "spec = importlib.util.spec_from_loader('helper', loader)\n"
            "helper = importlib.util.module_from_spec(spec)\n"
            "import sys; sys.modules['helper'] = helper; loader.exec_module(helper)\n"
            "helper.handle_endings(helper.leave)\n"
            f"assert signal.getsignal({int(number)}) is signal.SIG_IGN\n"
            f"for other in {sorted(map(int, set(ENDING) - {number}))}:\n"
            "    assert signal.getsignal(other) is helper.leave\n"
        )
        words: list[str | Path] = [sys.executable, "-c", code]
    else:  # a shell lets nobody trap what it was told to ignore; the script must not hide that
        code = f"kill -{number.name.removeprefix('SIG')} $$; exec {path} --help"
        words = ["/bin/bash", "-c", code]
    done = subprocess.run(
        ignoring(number, words), check=False, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done
    assert PROGRAMS.exists()
