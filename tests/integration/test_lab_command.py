"""kernel-helpers/lab as its caller on the host sees it; every boot costs some seconds."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.waiting import PATIENCE_SECONDS

if TYPE_CHECKING:
    from collections.abc import Iterator

LAB = Path(__file__).parents[2] / "kernel-helpers/lab"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vtpm-cuse"

boots = pytest.mark.skipif(
    shutil.which("qemu-system-x86_64") is None or not any(CACHE.glob("linux-*")),
    reason="the lab is not set up: ./setup lab --prepare",
)


def lab(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [LAB, *arguments],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@contextlib.contextmanager
def started(*arguments: str | Path, **environment: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [LAB, *arguments],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def machines_with(text: str) -> list[str]:
    """Return the command lines of live QEMU processes in which a text occurs."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if line.startswith("/usr/bin/qemu") and text in line:
                found.append(line)
    return found


@boots
def test_status_streams_environment_and_scratch(tmp_path: Path) -> None:
    scratch = tmp_path / "with, comma and space"
    mark = Path(f"/etc/lab-{uuid.uuid4()}")
    script = f"""
        echo out; echo err >&2; pwd; echo "$GIVEN" "$PASSED" "$HIDDEN."
        id -u >"$LAB_SCRATCH/uid"; touch {mark}; ls {mark}; exit 37
    """
    done = lab(
        *(
            "--scratch",
            scratch,
            "--env",
            "GIVEN=a 'b'",
            "--env",
            "PASSED",
            "--",
            "sh",
            "-c",
            script,
        ),
        PASSED="two words",
        HIDDEN="secret",
    )
    assert (done.stderr, done.returncode) == ("err\n", 37)
    assert done.stdout.splitlines() == ["out", os.getcwd(), "a 'b' two words .", str(mark)]
    assert (scratch / "uid").read_text() == "0\n"
    assert not mark.exists(), "the host's file tree was changed"


@boots
def test_success_and_quiet() -> None:
    done = lab("--quiet", "true")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@boots
def test_unknown_command() -> None:
    done = lab("--", "no-such-command-xyz", "argument")
    assert done.returncode == 127
    assert "no-such-command-xyz: not found" in done.stderr


@boots
def test_output_streams_and_ctrl_c_reaches_the_command(tmp_path: Path) -> None:
    scratch = tmp_path / uuid.uuid4().hex
    script = "trap 'echo bye; exit 3' INT; echo first; while :; do sleep 0.1; done"
    with started("--scratch", scratch, "--", "sh", "-c", script, TMPDIR=str(tmp_path)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "first\n"
        assert len(machines_with(scratch.name)) == 1
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == "bye\n"
        assert process.wait(timeout=PATIENCE_SECONDS) == 3
    assert machines_with(scratch.name) == []
    assert list(tmp_path.iterdir()) == [scratch], "temporary files are left"


@boots
def test_second_signal_ends_a_command_that_does_not(tmp_path: Path) -> None:
    scratch = tmp_path / uuid.uuid4().hex
    script = "trap 'echo no' TERM; echo first; while :; do sleep 0.1; done"
    with started("--scratch", scratch, "--", "sh", "-c", script, TMPDIR=str(tmp_path)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "first\n"
        process.terminate()
        assert process.stdout.readline() == "no\n"
        process.terminate()
        assert process.wait(timeout=PATIENCE_SECONDS) == 128 + signal.SIGTERM
    assert machines_with(scratch.name) == []
    assert list(tmp_path.iterdir()) == [scratch], "temporary files are left"


@boots
def test_time_limit(tmp_path: Path) -> None:
    scratch = tmp_path / uuid.uuid4().hex
    begin = time.monotonic()
    done = lab("--timeout", "6", "--scratch", scratch, "--", "sleep", "1000", TMPDIR=str(tmp_path))
    assert (done.returncode, done.stderr) == (124, "lab: timed out after 6 s\n")
    assert time.monotonic() - begin < 60
    assert machines_with(scratch.name) == []
    assert list(tmp_path.iterdir()) == [scratch], "temporary files are left"


@boots
def test_shell_reads_a_script_and_a_panic_is_told() -> None:
    process = subprocess.run(
        [LAB, "--shell"],
        input="echo from the script; echo c >/proc/sysrq-trigger; sleep 60\n",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.stdout == "from the script\n"
    assert process.returncode == 125
    assert process.stderr.startswith("lab: the guest ended; the last lines of its console:\n")
    assert "sysrq triggered crash" in process.stderr.lower()


def test_missing_program_is_named_with_its_package() -> None:
    done = lab("--", "true", PATH="")
    assert done.returncode == 125
    assert done.stderr == (
        "lab: qemu-system-x86_64 is missing: "
        "sudo apt-get install --no-install-recommends qemu-system-x86\n"
    )


def test_a_program_of_the_current_folder_counts_as_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "qemu-system-x86_64").write_text("#!/bin/sh\n")
    (tmp_path / "qemu-system-x86_64").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    done = lab("--", "true", PATH=":.", XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert (done.returncode, done.stderr[:37]) == (125, "lab: qemu-system-x86_64 is missing: s")


@pytest.mark.parametrize(
    "arguments", [[], ["--timeout", "0", "true"], ["--env", "1=2", "true"], ["--nosuch", "true"]]
)
def test_wrong_command_line(arguments: list[str]) -> None:
    done = lab(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: lab ")


@boots
def test_no_command_runs_by_a_clock_that_is_wrong(tmp_path: Path) -> None:
    """The frequency of the clock, which the guest guesses otherwise, is a tenth of the true one."""
    words = "clocksource=tsc tsc_early_khz=100000"
    done = lab("--append", words, "--scratch", tmp_path, "--", "touch", tmp_path / "made")
    assert done.returncode == 125
    assert done.stderr.count("; booting again") == 2
    assert "its clock is wrong" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "made").exists()
