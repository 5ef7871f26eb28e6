"""Words that no program expects: one line says what is wrong with them, and no traceback does."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.support.programs import module_of
from tests.support.sockets import environment
from tests.support.waiting import PATIENCE_SECONDS
from vtpm_cuse.ca.pkcs11 import TokenKey
from vtpm_cuse.errors import CertificateError, UsageError
from vtpm_cuse.manufacture.run import write_copies

if TYPE_CHECKING:
    from pathlib import Path

NOT_UTF8 = os.fsdecode(b"\xff")
NINES = "9" * 5000  # more digits than Python reads

SOCKET = ("swtpm", "socket", "--tpm2")


def run(*words: str, folder: Path, **env: str) -> subprocess.CompletedProcess[bytes]:
    program, *rest = words
    code = f"import sys; from {module_of(program)} import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", code, *rest],
        check=False,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        env={**environment(), **env},
        cwd=folder,
        timeout=PATIENCE_SECONDS,
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


SETUP = ("swtpm_setup", "--tpm2", "--tpm-state", ".")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--keyfile-fd", NINES), "Invalid file descriptor '999"),
        (("--pwdfile-fd", "99999999999999"), "Invalid file descriptor '999"),
        (("--profile-file-fd", "99999999999999"), "Invalid file descriptor '999"),
        (("--profile", "[" * 60000), "Failed to get 'Name' from profile '[["),
    ],
)
def test_setup_says_one_line(words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    done = run(*SETUP, *words, folder=tmp_path)
    assert done.returncode == 1
    assert done.stderr.decode().startswith(said)
    assert done.stderr.count(b"\n") == 1
    assert sorted(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "answer",
    [
        '{"features": 3}',
        '{"features": null}',
        '{"features": [[1], {}]}',
        '{"features": ["tpm-2.0", "cmdarg-print-profiles"], "AvailableProfiles": 5}',
        '{"features": ["tpm-2.0", "cmdarg-print-profiles"], "AvailableProfiles": [1, {"Name": 2}]}',
        "[" * 60000,
    ],
)
def test_an_emulator_that_says_nonsense(answer: str, tmp_path: Path) -> None:
    tool = tmp_path / "tool"
    tool.write_text(f"#!/bin/sh\necho '{answer}'\n")
    tool.chmod(0o755)
    for words in (("--profile-name", "x"), ("--print-capabilities",), ("--print-profiles",)):
        done = run(*SETUP, "--tpm", str(tool), *words, folder=tmp_path)
        assert done.stderr.count(b"\n") == done.returncode


def test_configuration_below_a_path_that_is_no_text(tmp_path: Path) -> None:
    words = ("swtpm_setup", "--create-config-files", "root")
    done = run(*words, folder=tmp_path, XDG_CONFIG_HOME=f"{tmp_path}/{NOT_UTF8}")
    assert done.returncode == 1
    assert done.stderr.endswith(b"\\udcff is not text in UTF-8\n")
    assert list(tmp_path.iterdir()) == []


def test_names_are_shown_whatever_the_locale(tmp_path: Path) -> None:
    words = ("swtpm_setup", "--create-config-files", "root")
    env = {"XDG_CONFIG_HOME": f"{tmp_path}/\xe4", "PYTHONIOENCODING": "ascii:strict"}
    done = run(*words, folder=tmp_path, **env)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(f"Writing {tmp_path}/\\xe4/swtpm_setup.conf.".encode())


def test_a_log_on_a_full_disk_costs_no_tpm(tmp_path: Path) -> None:
    done = run(*SETUP, "--logfile", "/dev/full", folder=tmp_path)
    assert done.returncode == 0
    assert done.stderr == b"Cannot write to logfile /dev/full.; No space left on device\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "tpm2-00.permall"]


def test_certificates_that_cannot_be_put_in_place_leave_nothing(tmp_path: Path) -> None:
    (tmp_path / "ek.crt").mkdir()
    with pytest.raises(UsageError, match=r"ek\.crt: Is a directory"):
        write_copies(str(tmp_path), {"ek.crt": b"certificate"})
    assert [path.name for path in tmp_path.iterdir()] == ["ek.crt"]


def test_a_pin_source_that_is_no_path() -> None:
    with pytest.raises(CertificateError, match="its pin-source cannot be read: embedded null"):
        TokenKey("pkcs11:object=a?pin-source=%00", None, {})


def test_log_prefix_of_any_bytes(tmp_path: Path) -> None:
    words = ("--tpmstate", f"dir={tmp_path}", "--log", f"level=20,prefix={NOT_UTF8}")
    done = run(*SOCKET, *words, "--print-info", "1", folder=tmp_path)
    assert done.returncode == 0
    assert b'"TPMSpecification"' in done.stdout
