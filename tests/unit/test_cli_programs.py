"""The programs as a shell sees them: text, exit status, what they import."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

from vtpm_cuse.cli import swtpm, swtpm_ioctl, vtpmd
from vtpm_cuse.cli.emulator import swtpm_cuse
from vtpm_cuse.cli.setup import swtpm_create_user_config_files
from vtpm_cuse.cli.words import program
from vtpm_cuse.cli.words.report import SetupReport
from vtpm_cuse.config import CuseConfig, LogConfig
from vtpm_cuse.errors import EngineUnavailable, UsageError
from vtpm_cuse.service import cuse
from vtpm_cuse.service.process import logs

if TYPE_CHECKING:
    from pathlib import Path

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _log_as_before() -> Iterator[None]:
    root = logging.getLogger("vtpm_cuse")
    level, propagate = root.level, root.propagate
    yield
    logs.configure(LogConfig(path="-"))
    root.setLevel(level)
    root.propagate = propagate


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Calls a program's main with words; gives status, output and errors."""

    def call(main: Callable[[], int], *words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["program", *words])
        status = main()
        return status, *capfd.readouterr()

    monkeypatch.delenv("TPM_PATH", raising=False)
    return call


def test_swtpm_without_interface(run: Run) -> None:
    status, out, err = run(swtpm.main)
    assert (status, out) == (1, "")
    assert err.startswith("Missing TPM interface type.\n")
    assert "Usage: swtpm INTERFACE [options]" in err


def test_swtpm_with_unknown_interface(run: Run) -> None:
    status, _, err = run(swtpm.main, "foo")
    assert status == 1
    assert err.startswith("Unsupported TPM interface type 'foo'.\n")


@pytest.mark.parametrize(
    ("main", "words", "start"),
    [
        (swtpm.main, ["--help"], "TPM emulator with choice of interface.\n"),
        (swtpm.main, ["-v"], "TPM emulator version 0.10.2 (vtpm-cuse "),
        (swtpm.main, ["cuse", "-v"], "TPM emulator CUSE interface version 0.10.2 (vtpm-cuse "),
        (swtpm.main, ["cuse", "--help", "x"], "Usage: swtpm cuse [options]\n"),
        (swtpm_cuse.main, ["--version"], "TPM emulator CUSE interface version 0.10.2 "),
        (swtpm_cuse.main, ["-h"], "Usage: swtpm-cuse [options]\n"),
        (vtpmd.main, ["--version"], "vtpm-cuse "),
        (swtpm_ioctl.main, ["--version"], "TPM emulator control tool version 0.10.2 "),
        (swtpm_ioctl.main, ["-c", "--help"], "TPM emulator control tool version 0.10.2 "),
    ],
)
def test_help_and_version(run: Run, main: Callable[[], int], words: list[str], start: str) -> None:
    status, out, err = run(main, *words)
    assert (status, err) == (0, "")
    assert out.startswith(start)


def test_cuse_errors_carry_the_programs_prefix(run: Run) -> None:
    assert run(swtpm.main, "cuse", "--bogus") == (
        254,
        "",
        "cuse: unrecognized option '--bogus'\nswtpm: Error: device name missing\n",
    )


def test_errors_go_to_the_log_once_there_is_one(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "log"
    assert run(swtpm_cuse.main, "--log", f"file={path},prefix=X ") == (254, "", "")
    assert path.read_text() == "X Error: device name missing\n"


def test_configuration_files_of_a_user(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program of that name; swtpm_setup has an option for it."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    main = swtpm_create_user_config_files.main
    status, out, err = run(main, "--root")
    assert (status, err) == (0, "")
    files = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert files == {"swtpm_setup.conf", "swtpm-localca.conf", "swtpm-localca.options"}
    assert sorted(out.splitlines()) == sorted(f"Writing {tmp_path / name}." for name in files)
    status, out, err = run(main, "--root")
    assert (status, out) == (1, "")
    assert "already exists. Refusing to overwrite." in err
    assert run(main, "--root", "--skip-if-exist") == (0, "", "")
    (tmp_path / "swtpm_setup.conf").write_text("old")
    assert run(main, "--root", "--overwrite")[0] == 0
    assert (tmp_path / "swtpm_setup.conf").read_text() != "old"


def test_print_states(run: Run, tmp_path: Path) -> None:
    state = f"dir={tmp_path}"
    none = '{ "type": "swtpm", "states": [] }'
    assert run(swtpm_cuse.main, "--print-states", "--tpmstate", state) == (0, none, "")
    (tmp_path / "tpm2-00.permall").write_bytes(b"12345")
    (tmp_path / "tpm2-00.volatilestate").write_bytes(b"1")
    some = (
        '{ "type": "swtpm", "states": [ {"name": "permall", "size": 5}, '
        '{"name": "volatilestate", "size": 1} ] }'
    )
    assert run(swtpm_cuse.main, "--print-states", "--tpm2", "--tpmstate", state) == (0, some, "")
    assert run(swtpm_cuse.main, "--print-states", "--tpmstate", state) == (0, none, "")
    assert run(swtpm_cuse.main, "--print-states") == (
        1,
        "",
        "swtpm: Error: --tpmstate option is required for --print-states\n",
    )


def test_cuse_serves_what_the_words_say(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[CuseConfig] = []

    def serve(config: CuseConfig) -> int:
        served.append(config)
        return 7

    monkeypatch.setattr(cuse, "run", serve)
    monkeypatch.setattr(os.path, "exists", lambda _: False)
    assert run(swtpm_cuse.main, "-n", "vtpm0", "--tpm2", "--print-info", "0") == (7, "", "")
    assert (served[0].name, served[0].vtpm.tpm2) == ("vtpm0", True)


def test_cuse_without_permission(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "exists", lambda _: True)
    monkeypatch.setattr(os, "access", lambda *_: False)
    status, _, err = run(swtpm_cuse.main, "-n", "vtpm0")
    assert status == 252
    assert err.startswith("swtpm: Error: Unable to setuid root. uid = ")


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UsageError("no", 77), 77, "no"),
        (EngineUnavailable("no engine", "install it"), 1, "no engine; install it"),
        (OSError(5, "Input/output error"), 1, "[Errno 5] Input/output error"),
        (KeyboardInterrupt(), 130, None),
    ],
)
def test_an_error_is_one_line(error: BaseException, status: int, line: str | None) -> None:
    said: list[str] = []

    def work() -> int:
        raise error

    assert program.run_program(work, said.append) == status
    assert said == ([] if line is None else [line])


def test_a_reader_that_leaves_early_causes_no_noise() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    code = "from vtpm_cuse.cli.swtpm import main; sys.argv[1:] = ['--help']; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {code}"],
        stdout=writer,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize(
    ("module", "words", "unwanted"),
    [
        ("swtpm_ioctl", ["--help"], "dataclasses logging socket cffi trio vtpm_cuse.wire"),
        ("swtpm_ioctl", ["-c", "/dev/null"], "logging socket cffi trio"),
        ("swtpm", ["--help"], "dataclasses logging socket cffi trio vtpm_cuse.wire"),
        ("emulator.swtpm_cuse", ["--help"], "socket cffi trio vtpm_cuse.engine vtpm_cuse.wire"),
    ],
)
def test_no_program_imports_what_it_does_not_use(
    module: str, words: list[str], unwanted: str
) -> None:
    code = (
        f"import sys; from vtpm_cuse.cli.{module} import main; sys.argv[1:] = {words!r}; main();"
        f"print(*set({unwanted.split()!r}) & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == ""


def test_what_serves_on_sockets_has_no_dataclasses() -> None:
    """Each takes as long to make as ten named tuples, at every start."""
    modules = "acquire.sockets serve.sockets service.compose service.confine.sandbox service.socket"
    code = "".join(f"import vtpm_cuse.{module}\n" for module in modules.split())
    code += (
        "import sys\n"
        "for name in [name for name in sys.modules if name.startswith('vtpm_cuse.')]:\n"
        "    for what, value in vars(sys.modules[name]).items():\n"
        "        if hasattr(value, '__dataclass_fields__'):\n"
        "            print(name, what)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""


def test_a_message_has_nothing_that_a_terminal_obeys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may quote what others have written."""
    report = SetupReport(str(tmp_path / "log"))
    report.line("the tool said \x1b[2J\r")
    report.error("\x7f\x85 is no setting")
    program.complain("no option \x1b[31m\n\tin the file")
    wanted = "\\u007f\\u0085 is no setting\nno option \\u001b[31m\n\tin the file\n"
    assert capsys.readouterr().err.endswith(wanted)
    assert "\\u001b[2J\\u000d\n" in (tmp_path / "log").read_text()
