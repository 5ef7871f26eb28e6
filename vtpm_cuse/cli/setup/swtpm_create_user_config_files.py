"""``swtpm-create-user-config-files``: what ``swtpm_setup --create-config-files`` does."""

from __future__ import annotations

import sys
from typing import Final

from vtpm_cuse.cli.words.commandline import CommandLine
from vtpm_cuse.cli.words.help import help_text
from vtpm_cuse.cli.words.program import complain, run_program
from vtpm_cuse.cli.words.table import Example, Option, Program, Term

_WORDS: Final = ("overwrite", "root", "skip-if-exist")

PROGRAM: Final = Program(
    "swtpm-create-user-config-files",
    "write configuration files of one's own for swtpm_setup",
    (
        Option("overwrite", "write over files that are there"),
        Option("root", "for root, too, whose files then count before those of the machine"),
        Option("skip-if-exist", "do nothing if one of them is there"),
        Option("help", "display this help and exit", letter="h"),
    ),
    description=(
        "Writes the files with which a user without root sets TPMs up, as swtpm_setup(8) does with "
        "the option --create-config-files: that program's configuration, and that of a local CA.",
    ),
    examples=(Example("", "swtpm-create-user-config-files --skip-if-exist"),),
    environment=(Term("XDG_CONFIG_HOME", "Where they are written, by default ~/.config."),),
    see_also=("swtpm_setup(8)", "swtpm_setup.conf(5)", "swtpm-localca.conf(5)"),
)


def main() -> int:
    """The program swtpm-create-user-config-files."""
    return run_program(lambda: _run(sys.argv[1:]), complain)


def _run(words: list[str]) -> int:
    line = CommandLine(PROGRAM, words)
    if line.has("help"):
        print(help_text(PROGRAM), end="")
        return 0
    from vtpm_cuse.cli.setup.swtpm_setup import write_config_files

    write_config_files(",".join(word for word in _WORDS if line.has(word)))
    return 0
