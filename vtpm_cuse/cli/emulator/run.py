"""What the programs of all interfaces have in common."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from vtpm_cuse import __version__
from vtpm_cuse.cli.emulator import prints, settings
from vtpm_cuse.cli.words.commandline import CommandLine
from vtpm_cuse.cli.words.help import help_text
from vtpm_cuse.cli.words.program import run_program, version_text
from vtpm_cuse.config import LogConfig
from vtpm_cuse.service.process import logs

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vtpm_cuse.cli.words.table import Program

    Serve = Callable[[CommandLine], int]
    Inform = Callable[[CommandLine, int], str | None]

log = logging.getLogger(__name__)


def info_of_state(line: CommandLine, flags: int) -> str | None:
    """``--print-info`` of the TPM that *line* describes; None after an error that was said."""
    process = settings.process_config(line, background=False)
    return prints.info_of_state(flags, settings.vtpm_config(line), process)


def run_emulator(
    table: Program,
    words: Sequence[str],
    name: str,
    serve: Serve,
    inform: Inform = info_of_state,
) -> int:
    """Prints what *words* ask for, or calls *serve* with them; returns the exit status.

    Args:
        table: The program.
        words: What follows its name.
        name: How it was called.
        serve: Serves a TPM.
        inform: The text of ``--print-info``.
    """
    logs.configure(LogConfig())  # until --log has been read
    return run_program(
        lambda: _run(CommandLine(table, words, name), name, serve, inform),
        log.error,
        clears_up=False,
    )


def run_server(table: Program, words: Sequence[str], name: str, serve: Serve) -> int:
    """As `run_emulator`, of a program that has no TPM of its own to tell of."""
    unasked = LogConfig(prefix=f"{table.name.split()[0]}: ")
    logs.configure(unasked)

    def run() -> int:
        line = CommandLine(table, words, name)
        if line.has("version"):
            print(f"vtpm-cuse {__version__}")  # the C suite has no such program
            return 0
        if _has_told(line, name):
            return 0
        logs.configure(settings.log_config(line, unasked))
        return serve(line)

    return run_program(run, log.error, clears_up=False)


def _has_told(line: CommandLine, name: str) -> bool:
    if line.has("help"):
        print(help_text(line.program, name), end="")
    elif line.has("version"):
        print(version_text(f"{line.program.name.split()[-1].upper()} interface "))
    else:
        return False
    return True


def _run(line: CommandLine, name: str, serve: Serve, inform: Inform) -> int:
    if _has_told(line, name):
        return 0
    flags = line.number("print-info", 0xFFFF_FFFF)
    settings.enter_root(line)
    logs.configure(settings.log_config(line))
    text = prints.asked_text(line)
    if text is None and not flags:
        return serve(line)
    if text is None:
        text = inform(line, flags)
    if text is None:
        return 1
    print(text, end="")
    return 0
