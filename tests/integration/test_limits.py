"""Where no thread and no process can be had: one line, and nothing appears."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.kernel.harness import PROGRAMS
from tests.support import sockets as s
from tests.support.fuse import User, needs_fuse, ordinary_user

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def user() -> Iterator[User]:
    with ordinary_user() as user:
        yield user


@pytest.mark.parametrize(
    ("words", "missing"),
    [
        ("socket --ctrl type=unixio,path=c", "thread"),
        ("socket --ctrl type=unixio,path=c --daemon", "other process"),
        ("chardev --chardev /dev/zero --ctrl type=unixio,path=c", "thread"),
        ("fuse -n x --mount m --foreground", "other process"),
        ("fuse -n x --mount m", "other process"),
    ],
)
def test_no_thread_and_no_process(words: str, missing: str, user: User) -> None:
    if "fuse" in words:
        needs_fuse()
    (user.folder / "state").mkdir()
    user.own(user.folder / "state")
    swtpm, state = str(PROGRAMS / "swtpm"), f"dir={user.folder / 'state'}"
    done = user.run(
        *("bash", "-c", 'cd "$1"; shift; ulimit -u 1; exec "$@"', "bash", user.folder, swtpm),
        *(*words.split(), "--tpm2", "--tpmstate", state, "--flags", "startup-clear"),
        status=1,
    )
    hint = "raise the limit: 'ulimit -u', or TasksMax= of a unit"
    assert done.stderr == f"swtpm: Error: No {missing} can be started; {hint}\n"
    assert set(os.listdir(user.folder)) <= {"state", "run"}
    assert not os.listdir(user.folder / "state")


@pytest.mark.parametrize("most", range(1, 6))
def test_as_many_as_it_takes_or_one_line(most: int, user: User) -> None:
    """Sockets and pid file outside the state's folder take a process more than the rest."""
    (user.folder / "state").mkdir()
    user.own(user.folder / "state")
    swtpm, state = str(PROGRAMS / "swtpm"), f"dir={user.folder / 'state'}"
    words = "socket --ctrl type=unixio,path=c --pid file=p --tpm2 --flags startup-deactivated"
    done = user.run(
        *("bash", "-c", f'cd "$1"; shift; ulimit -u {most}; exec "$@"', "bash", user.folder),
        *(swtpm, *words.split(), "--tpmstate", state),
        status=None,
    )
    limit = "thread can be started; raise the limit: 'ulimit -u', or TasksMax= of a unit"
    reasons = {f"Error: No {limit}", "TPM 2 does not support startup deactivated."}
    assert done.stderr.removeprefix("swtpm: ").rstrip("\n") in reasons
    assert set(os.listdir(user.folder)) <= {"state", "run"}


@pytest.mark.parametrize("kib", [24_000, 32_000, 36_000, 40_000, 44_000])
def test_too_little_memory(kib: int, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    words = ["--tpm2", "--tpmstate", f"dir={tmp_path / 'state'}", "--flags", "startup-clear"]
    control = f"type=unixio,path={tmp_path / 'c'}"
    program = ("bash", "-c", f'ulimit -v {kib}; exec "$@"', "bash", *s.OURS)
    done = s.run_swtpm(*words, "--ctrl", control, program=program)
    reason = "There is too little memory; raise the limit: 'ulimit -v', or LimitAS= of a unit"
    assert done.returncode == 1
    assert done.stderr.removeprefix("swtpm: ").removeprefix("Error: ") == f"{reason}\n"
    assert os.listdir(tmp_path) == ["state"]


@pytest.mark.parametrize("kib", range(14_000, 24_000, 500))
def test_too_little_memory_to_load_a_program(kib: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            "bash",
            "-c",
            f'ulimit -v {kib}; exec "$@"',
            "bash",
            PROGRAMS / "swtpm_setup",
            "--version",
        ],
        check=False,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == (done.returncode != 0)
    assert done.returncode in {0, 1}


def test_too_few_descriptors_are_no_reason_to_install_libtpms(tmp_path: Path) -> None:
    code = (
        "import resource, sys; from vtpm_cuse.engine._libtpms import ffi;"
        "from vtpm_cuse.errors import VtpmError; from vtpm_cuse.engine import libtpms;"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))\n"
        "try: libtpms.supported_versions()\n"
        "except VtpmError as exc: sys.exit(str(exc))"
    )
    done = subprocess.run(
        [PROGRAMS / "python", "-c", code], check=False, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stderr.endswith("Too many open files\n")
    assert "install" not in done.stderr


@pytest.mark.parametrize("most", range(9, 20))
def test_too_few_descriptors_are_one_line(most: int, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    words = ["--tpm2", "--tpmstate", f"dir={tmp_path / 'state'}"]
    words += ["--flags", "not-need-init,startup-deactivated", "--pid", f"file={tmp_path / 'pid'}"]
    words += ["--ctrl", f"type=unixio,path={tmp_path / 'c'}"]
    words += ["--server", f"type=unixio,path={tmp_path / 's'}"]
    program = ("bash", "-c", f'ulimit -n {most}; exec "$@"', "bash", *s.OURS)
    done = s.run_swtpm(*words, program=program)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    cure = "; raise the limit: 'ulimit -n', or LimitNOFILE= of a unit"
    assert line.endswith(cure) or line == "TPM 2 does not support startup deactivated."
    assert "Errno" not in line
    assert os.listdir(tmp_path) == ["state"]


@pytest.mark.parametrize("background", [(), ("--daemon",)], ids=["", "daemon"])
@pytest.mark.parametrize(
    "control",
    ["type=unixio,path={0}/nowhere/c", "type=unixio,path={0}/taken", "type=unixio,path={0}/c"],
)
def test_a_start_that_fails_leaves_no_pid_file(
    control: str, background: tuple[str, ...], tmp_path: Path
) -> None:
    """Whether it fails before or after there are sockets; one that was there stays."""
    (tmp_path / "state").mkdir()
    (tmp_path / "state/tpm2-00.permall").write_bytes(bytes(100))
    (tmp_path / "taken").write_text("of somebody else")
    words = ["--tpm2", "--tpmstate", f"dir={tmp_path / 'state'}", "--flags", "startup-clear"]
    words += ["--ctrl", control.format(tmp_path), "--pid", f"file={tmp_path / 'pid'}", *background]
    for there in ({"state", "taken"}, {"state", "taken", "pid"}):
        done = s.run_swtpm(*words)
        assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
        assert set(os.listdir(tmp_path)) == there
        (tmp_path / "pid").write_text("123")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("swtpm socket --tpm2 --tpmstate dir=S --ctrl type=unixio,path=/tmp/none/c", "S"),
        ("swtpm socket --tpm2 --tpmstate dir=/none --ctrl type=unixio,path=c", "c"),
        ("swtpm socket --tpm2 --tpmstate dir=/none --pid file=p", "p"),
        ("swtpm socket --tpm2 --tpmstate dir=/none --log file=l", "l"),
        ("swtpm chardev --tpm2 --tpmstate dir=/none --chardev d", "d"),
        ("swtpm fuse -n x --mount m", "m"),
        ("swtpm_setup --tpm2 --tpm-state S", "S"),
    ],
)
def test_a_current_directory_that_is_gone(words: str, named: str, tmp_path: Path) -> None:
    """The relative path that leads nowhere is named; /bin/sh has a line about it, too."""
    gone = tmp_path / "gone"
    gone.mkdir()
    program, *rest = words.split()
    code = 'cd "$1" && rmdir "$1" && shift && exec "$@"'
    done = subprocess.run(
        ["bash", "-c", code, "bash", gone, PROGRAMS / program, *rest],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    *_, line = done.stderr.splitlines()
    assert line.endswith(f"The current directory has been removed: '{named}'")
