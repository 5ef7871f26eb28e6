"""kernel-helpers/tpm-device without a device; with one: tests/kernel/test_containers.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.waiting import PATIENCE_SECONDS

TREE = Path(__file__).parents[2]
HELPER = TREE / "kernel-helpers/tpm-device"
SWTPM = Path(sys.executable).parent / "swtpm"
NOWHERE = "/dev/tpm63999"


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("--timeout", "0.2", NOWHERE), 1, f"tpm-device: {NOWHERE} has not come within 0.2 s; "),
        (("--", SWTPM, "chardev"), 1, "swtpm: Error: Missing character device"),
        (("--", "sh", "-c", "exit 7"), 7, ""),
        (("--", "true"), 1, "tpm-device: true named no device; is --vtpm-proxy there?"),
        (("--", "/none/none"), 1, "tpm-device: /none/none: No such file or directory"),
        (("--timeout", "0.2", "--", "cat", "/dev/zero"), 1, "tpm-device: cat has not returned"),
        ((), 2, "usage: tpm-device"),
        (("/dev/null",), 2, "usage: tpm-device"),
        (("--mode", "0999", NOWHERE), 2, "usage: tpm-device"),
        (("--owner", "no:such", NOWHERE), 2, "usage: tpm-device"),
    ],
)
def test_says_what_is_wrong(words: tuple[str | Path, ...], status: int, said: str) -> None:
    done = subprocess.run(
        [HELPER, *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.startswith(said)
    assert "Traceback" not in done.stderr


def test_a_program_of_the_current_folder_is_not_run_for_its_name(tmp_path: Path) -> None:
    (tmp_path / "maker").write_text("#!/bin/sh\n: >ran\n")
    (tmp_path / "maker").chmod(0o755)
    words: list[str | Path] = [HELPER, "--", "maker"]
    env = {**os.environ, "PATH": ":.:/none"}
    done = subprocess.run(
        words,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
        cwd=tmp_path,
        env=env,
    )
    assert not (tmp_path / "ran").exists()
    said = "tpm-device: maker: No such file or directory\n"
    assert (done.returncode, done.stderr) == (1, said)


def test_device_that_is_named_but_never_comes() -> None:
    line = f"New TPM device: {NOWHERE} (major/minor = 1/2)"
    done = subprocess.run(
        [HELPER, "--timeout", "0.2", "--", "echo", line],
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"tpm-device: {NOWHERE} has not come within 0.2 s; see dmesg\n"
