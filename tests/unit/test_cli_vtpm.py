"""The program ``vtpm``: its commands as a shell sees them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Final

import pytest

from tests.support import commands as tpm
from tests.support.programs import module_of
from vtpm_cuse import __version__
from vtpm_cuse.cli.vtpm import vtpm
from vtpm_cuse.service import doctor
from vtpm_cuse.wire.pcapng import Conversation, file_header

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.programs import Run

PROGRAM: Final = [
    sys.executable,
    "-c",
    "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "  # as installed programs do
    f"from {module_of('vtpm')} import main; sys.exit(main())",
]
AS_USERS: Final = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
"""With it, nothing would have to be flushed."""
ANSWERED: Final = bytes.fromhex("80010000000a00000922")
AUTH_FAIL: Final = "0x98e [TPM] TPM_RC_AUTH_FAIL, session 1: wrong password or HMAC, "


def capture(commands: int = 1) -> bytes:
    talk = Conversation(50000)
    found = file_header() + talk.begin(1_000_000)
    for _ in range(commands):
        found += talk.command(tpm.get_random(8), 2_000_000) + talk.response(ANSWERED, 2_001_000)
    return found + talk.end(3_000_000)


LINE: Final = (
    "1970-01-01T00:00:02.000000Z TPM2_GetRandom(), parameters 2 of 12 bytes -> "
    "TPM_RC_RETRY (0x922), 10 bytes, 1.000 ms\n"
    "    the TPM could not start the command: send it again\n"
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tpm.pcapng"
    path.write_bytes(capture())
    return path


# -- vtpm ---------------------------------------------------------------------------------


def test_the_first_word_chooses(run: Run) -> None:
    assert run("--version") == (0, f"vtpm-cuse {__version__}\n", "")
    status, out, err = run("--help")
    assert (status, err) == (0, "")
    assert out.startswith("Usage: vtpm COMMAND [options]\n")
    assert all(f"\n  {sub.name} " in out for sub in vtpm.PROGRAM.subcommands)
    status, out, err = run()
    assert (status, out) == (1, "")
    assert err.startswith("vtpm: What is to be done? The first word says it.\nUsage: vtpm COMMAND")
    status, out, err = run("trcae")
    assert (status, out) == (1, "")
    assert err.startswith("vtpm: There is no command 'trcae'.\nUsage: vtpm COMMAND")


@pytest.mark.parametrize("command", [sub.name for sub in vtpm.PROGRAM.subcommands])
def test_every_command_has_help_with_examples(run: Run, command: str) -> None:
    status, out, err = run(command, "--help")
    assert (status, err) == (0, "")
    assert out.startswith(f"Usage: vtpm {command} ")
    assert "\nExamples:\n" in out
    status, out, err = run(command, "--bogus")
    assert (status, out) == (125 if command == "run" else 1, "")  # which else is that of a command
    assert err == (
        f"vtpm {command}: unrecognized option '--bogus'\n"
        f"vtpm {command}: Try 'vtpm {command} --help' for the options\n"
    )


def test_doctor_is_that_of_swtpm(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    diagnosis = doctor.Diagnosis((), (), "type this")
    monkeypatch.setattr(doctor, "diagnose", lambda _: diagnosis)
    status, out, _ = run("doctor", "--json")
    assert json.loads(out)["next"] == "type this"
    assert status == (0 if diagnosis.healthy else 1)


# -- vtpm rc ------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["0x98e", "0X98E", "98e", "0000098e", "2446"])
def test_a_code_as_programs_print_it(run: Run, word: str) -> None:
    status, out, err = run("rc", word)
    assert (status, err) == (0, "")
    assert out.startswith(AUTH_FAIL)
    assert out.count("\n") == 1


@pytest.mark.parametrize(
    ("word", "codes"),
    [
        ("922", [0x39A, 0x922]),  # may be either
        ("2314", [0x90A]),  # 0x2314 is no code
        ("101", [0x101]),  # 0x65 is none
        ("00000101", [0x101]),
        ("0", [0]),
        ("1", [1]),
        ("655370", [0xA000A]),
        ("4294967295", [0xFFFFFFFF]),
    ],
)
def test_digits_alone_are_decimal_or_what_has_a_name(run: Run, word: str, codes: list[int]) -> None:
    _, out, _ = run("rc", "--json", word)
    said = [json.loads(line) for line in out.splitlines()]
    assert [one["code"] for one in said] == codes
    assert {one["word"] for one in said} == {word}


def test_several_codes_and_one_that_nobody_knows(run: Run) -> None:
    status, out, err = run("rc", "0x98e", "0x50001", "0xa000a")
    assert (status, err) == (2, "")
    first, second, third = out.splitlines()
    assert first.startswith(AUTH_FAIL)
    assert second == "0x50001 [layer 5] unknown: nobody has given this code a meaning"
    assert third.startswith("0xa000a [TCTI] TSS2_TCTI_RC_IO_ERROR: ")


def test_codes_of_a_tpm12(run: Run) -> None:
    assert run("rc", "--tpm12", "0x1")[1].startswith("0x1 [TPM 1.2] TPM_AUTHFAIL: ")
    assert run("rc", "--tpm12", "0x98e")[:2] == (
        2,
        "0x98e [TPM 1.2] unknown: nobody has given this code a meaning\n",
    )


def test_json_of_a_code(run: Run) -> None:
    assert json.loads(run("rc", "--json", "0x2cb")[1]) == {
        "word": "0x2cb",
        "code": 0x2CB,
        "layer": "TPM",
        "name": "TPM_RC_HANDLE",
        "where": "parameter 2",
        "words": "nothing has this handle, or nothing that fits",
    }


@pytest.mark.parametrize("word", ["x", "0x", "0x100000000", "", "9" * 5000, "98e ", "٣"])
def test_what_is_no_code(run: Run, word: str) -> None:
    assert run("rc", "0x98e", word) == (
        1,
        "",
        f"vtpm rc: '{word}' is no response code; write it as 0x98e\n",
    )


def test_no_code(run: Run) -> None:
    assert run("rc") == (1, "", "vtpm rc: There is no code; write one as 0x98e\n")


# -- vtpm trace ---------------------------------------------------------------------------


def test_a_capture(run: Run, file: Path) -> None:
    assert run("trace", str(file)) == (0, LINE, "")
    status, out, err = run("trace", "--json", str(file))
    assert (status, err) == (0, "")
    said = json.loads(out)
    assert said["command"]["name"] == "TPM2_GetRandom"
    assert said["response"]["result"]["name"] == "TPM_RC_RETRY"
    assert (said["micros"], said["duration"]) == (2_000_000, 1000)


def test_standard_input(file: Path) -> None:
    with file.open("rb") as stream:
        done = subprocess.run(
            [*PROGRAM, "trace", "-"], stdin=stream, capture_output=True, text=True, check=False
        )
    assert (done.returncode, done.stdout, done.stderr) == (0, LINE, "")


def test_a_line_is_there_while_more_may_come() -> None:
    with subprocess.Popen(
        [*PROGRAM, "trace", "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=AS_USERS
    ) as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write(capture())
        process.stdin.flush()
        assert process.stdout.readline().decode() == LINE.splitlines(keepends=True)[0]
        process.stdin.close()
        assert process.wait() == 0


def test_ctrl_c_ends_it_without_a_word() -> None:
    with subprocess.Popen(
        [*PROGRAM, "trace", "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=AS_USERS,
    ) as process:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        process.stdin.write(capture())
        process.stdin.flush()
        assert process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == b""
        assert process.wait() == -signal.SIGINT


def test_a_reader_that_has_seen_enough(tmp_path: Path) -> None:
    path = tmp_path / "long"
    path.write_bytes(capture(5000))
    with subprocess.Popen(
        [*PROGRAM, "trace", path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=AS_USERS
    ) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1


def test_a_disk_that_is_full_is_not_the_captures_fault(file: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*PROGRAM, "trace", file], stdout=full, stderr=subprocess.PIPE, env=AS_USERS, text=True
        )
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    assert "read" not in done.stderr


@pytest.mark.parametrize(
    ("keep", "status", "trouble"),
    [
        (-1, 2, "the file ends within a block, 87 bytes of which are there"),
        (30, 1, "the file ends within a block, 2 bytes of which are there"),
        (0, 1, "the file is empty"),
    ],
)
def test_a_capture_that_is_cut_off(
    run: Run, file: Path, keep: int, status: int, trouble: str
) -> None:
    file.write_bytes(file.read_bytes()[:keep])
    out = LINE if status == 2 else ""
    assert run("trace", str(file)) == (status, out, f"vtpm trace: {file}: {trouble}\n")


def test_a_capture_without_a_tpm(run: Run, file: Path) -> None:
    file.write_bytes(file_header() + Conversation(1).begin(0))
    said = f"vtpm trace: {file}: no TPM command is in it, of 3 packets\n"
    assert run("trace", str(file)) == (0, "", said)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "Name one capture, or - for standard input"),
        (["a", "b"], "Name one capture, or - for standard input"),
        (["none/such"], "Could not read none/such: No such file or directory"),
        (["/"], "Could not read /: Is a directory"),
        (["a\0b"], "Could not read a\\u0000b: no file has such a name"),
        (["/dev/null"], "/dev/null: the file is empty"),
    ],
)
def test_what_cannot_be_read(run: Run, words: list[str], said: str) -> None:
    assert run("trace", *words) == (1, "", f"vtpm trace: {said}\n")


def test_a_terminal_is_no_capture() -> None:
    ours, theirs = os.openpty()
    with os.fdopen(ours), os.fdopen(theirs) as terminal:
        done = subprocess.run(
            [*PROGRAM, "trace", "-"], stdin=terminal, capture_output=True, text=True, check=False
        )
    assert done.returncode == 1
    assert done.stderr == (
        "vtpm trace: Standard input is a terminal; name a capture, or give one to it\n"
    )
