"""Every program is in the registry, and its table is fit for help, manual and completions."""

from __future__ import annotations

import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

from tools.manual.config_files import CONFIG_FILES
from vtpm_cuse.cli.registry import MODULES, program_of, programs
from vtpm_cuse.cli.words.commandline import CommandLine
from vtpm_cuse.cli.words.help import help_text
from vtpm_cuse.cli.words.table import Example, Lenient, Option, Program, SubOption, Term
from vtpm_cuse.errors import UsageError

ROOT = Path(__file__).parents[2]

parametrized = pytest.mark.parametrize("program", programs(), ids=lambda program: program.name)


def installed() -> dict[str, str]:
    """Installed programs, name to module."""
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    rows = config["options.entry_points"]["vtpm_cuse.programs"].strip().splitlines()
    pairs = (row.partition("=") for row in rows)
    return {name.strip(): target.strip().partition(":")[0] for name, _, target in pairs}


@pytest.mark.parametrize(("name", "module"), installed().items())
def test_every_installed_program_is_registered(name: str, module: str) -> None:
    assert module in MODULES
    program = program_of(module)
    assert name in {program.name, *program.aliases}


def test_every_registered_program_can_be_started() -> None:
    chosen = {f"{p.name} {sub.name}" for p in programs() for sub in p.subcommands}
    assert {p.name for p in programs()} <= chosen | set(installed())


def test_every_subcommand_is_registered() -> None:
    for program in programs():
        for sub in program.subcommands:
            assert sub.module in MODULES
            chosen = program_of(sub.module)
            assert f"{program.name} {sub.name}" in {chosen.name, *chosen.aliases}


@parametrized
def test_help_names_every_option_that_works_and_no_other(program: Program) -> None:
    text = help_text(program, "tool x")
    assert text.startswith(program.banner or "Usage: tool x")
    assert all(len(row) < 80 for row in text.splitlines())
    words = text.replace(",", " ").split()
    for option in program.options:
        assert all((word in words) is option.available for word in option.words)
        assert not option.available or option.help in " ".join(text.split())
        for sub in option.subs:
            assert (sub.help in " ".join(text.split())) is sub.available


@parametrized
def test_table_has_no_name_twice_and_says_something_about_each(program: Program) -> None:
    words = [word for option in program.options for word in option.words]
    assert len(words) == len(set(words))
    assert all(option.help for option in program.available)
    assert all(bool(option.noun) == bool(option.subs) for option in program.options)
    assert all(not option.single_dash or program.long_only for option in program.options)
    assert program.examples
    assert program.summary
    assert program.summary[-1] != "."


def test_manual_and_completions_are_up_to_date() -> None:
    check = [sys.executable, "-m", "tools.manual", "--check", str(ROOT)]
    done = subprocess.run(check, check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"run .venv/bin/python -m tools.manual\n{done.stdout}"


KEYS = [key.name for file in CONFIG_FILES for key in file.keys if "-" not in key.name]


@pytest.mark.parametrize("key", KEYS)
def test_what_the_manual_says_of_a_configuration_file_is_read(key: str) -> None:
    word = key.partition(":")[0]
    sources = [p for p in (ROOT / "vtpm_cuse").rglob("*.py") if p.parent.name != "manual"]
    assert any(f'"{word}"' in path.read_text() for path in sources)


TOOL = Program(
    "tool",
    "does things",
    (
        Option("set", "sets", letter="s", metavar="WHAT", repeats=True),
        Option("config", "makes files", metavar="HOW", optional_value=True),
        Option("state", "where", noun="state", subs=(SubOption("dir", "d", metavar="DIR"),)),
        Option("later", "not yet", available=False),
        Option("help", "helps"),
    ),
    examples=(Example("Do it", "tool --set x"),),
    lenient=Lenient.NOTHING,
    bad_value=7,
)


def test_repeated_and_optional_values() -> None:
    line = CommandLine(TOOL, ["-s", "a", "--config", "--set=b", "--help", "x"])
    assert line.values("set") == ["a", "b"]
    assert (line.value("set"), line.value("config")) == ("b", "")
    assert line.operands == ["x"]
    assert CommandLine(TOOL, ["--config", "root"]).value("config") == "root"
    assert CommandLine(TOOL, ["--config=root"]).value("config") == "root"
    again = CommandLine(TOOL, ["--state", "dir=a", "--state", "dir=b"])
    assert again.values("state") == ["dir=b"]
    assert "--config [HOW]" in help_text(TOOL)
    assert "--later" not in help_text(TOOL)


def test_errors_have_the_exit_status_of_the_table() -> None:
    with pytest.raises(UsageError) as info:
        CommandLine(TOOL, ["--state", "x"]).subs("state")
    assert info.value.exit_status == 7
    with pytest.raises(UsageError, match="not available yet") as info:
        CommandLine(TOOL, ["--later"])
    assert info.value.exit_status == 7
    with pytest.raises(UsageError, match="Unknown parameter 'x'"):
        CommandLine(TOOL, ["x"])
    assert CommandLine(TOOL._replace(operands=(Term("X", "y"),)), ["x"]).operands == ["x"]
