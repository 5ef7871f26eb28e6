"""Words that no program expects: one line says what is wrong with them, and no traceback does."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.support.sockets import environment

if TYPE_CHECKING:
    from pathlib import Path

NOT_UTF8 = os.fsdecode(b"\xff")
NINES = "9" * 5000  # more digits than Python reads

SOCKET = ("swtpm", "socket", "--tpm2")


def run(*words: str, folder: Path, **env: str) -> subprocess.CompletedProcess[bytes]:
    program, *rest = words
    code = f"import sys; from vtpm_cuse.cli.{program} import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", code, *rest],
        check=False,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        env={**environment(), **env},
        cwd=folder,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((*SOCKET, "--runas", NINES), "outside valid range."),
        ((*SOCKET, "--runas", "--5"), "User '--5' does not exist."),
        ((*SOCKET, "--key", f"keyring={NOT_UTF8}"), "of the kernel's keyrings: "),
        (
            (*SOCKET, "--server", f"type=tcp,port=0,bindaddr={NOT_UTF8}"),
            r"Could not parse the bind address '\udcff'",
        ),
        (("swtpm_ioctl", "-c", "--tcp", f"{NOT_UTF8}:1"), "it is no host name"),
        (("swtpm_ioctl", "-c", "--tcp", f"{'a' * 64}:1"), "it is no host name"),
        (("swtpm_bios", "--tcp", "x..y:1"), "it is no host name"),
    ],
)
def test_one_line(words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    if words[0] == "swtpm":
        words = (*words, "--tpmstate", f"dir={tmp_path}")
    done = run(*words, folder=tmp_path)
    assert done.returncode in {1, 255}
    assert said in done.stderr.decode()
    assert done.stderr.count(b"\n") == 1


def test_log_prefix_of_any_bytes(tmp_path: Path) -> None:
    words = ("--tpmstate", f"dir={tmp_path}", "--log", f"level=20,prefix={NOT_UTF8}")
    done = run(*SOCKET, *words, "--print-info", "1", folder=tmp_path)
    assert done.returncode == 0
    assert b'"TPMSpecification"' in done.stdout
