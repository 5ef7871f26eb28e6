"""``vtpm``: chooses what to do by its first word."""

from __future__ import annotations

import sys
from typing import Final

from vtpm_cuse import __version__
from vtpm_cuse.cli.words.front import run_chosen
from vtpm_cuse.cli.words.program import complain, run_program
from vtpm_cuse.cli.words.table import Example, Option, Program, Subcommand

PROGRAM: Final = Program(
    "vtpm",
    "virtual TPMs, for people",
    (
        Option("version", "print the version and end", letter="v"),
        Option("help", "print this help and end; each command has its own", letter="h"),
    ),
    usage=("COMMAND [options]", "-v|--version", "-h|--help"),
    subcommands=(  # each is a line here and one in cli/registry.py
        Subcommand(
            "clients",
            "who uses a TPM through its resource manager",
            "vtpm_cuse.cli.vtpm.vtpm_clients",
        ),
        Subcommand(
            "doctor",
            "what this machine offers, and what to type next",
            "vtpm_cuse.cli.swtpm_doctor",
        ),
        Subcommand("env", "how to reach a TPM that runs", "vtpm_cuse.cli.vtpm.vtpm_env"),
        Subcommand(
            "flush",
            "end what a client of a resource manager has in the TPM",
            "vtpm_cuse.cli.vtpm.vtpm_flush",
        ),
        Subcommand("rc", "what a response code means", "vtpm_cuse.cli.vtpm.vtpm_rc"),
        Subcommand("run", "run a command with a TPM of its own", "vtpm_cuse.cli.vtpm.vtpm_run"),
        Subcommand(
            "trace", "the commands of a packet capture, readable", "vtpm_cuse.cli.vtpm.vtpm_trace"
        ),
    ),
    description=(
        "Runs commands with TPMs of their own, and answers questions about TPMs. The first word "
        "chooses which; every command has a help screen and a manual page. To serve a TPM is what "
        "swtpm(8) does.",
    ),
    examples=(
        Example("", "vtpm run tpm2_getrandom --hex 8"),
        Example("", "vtpm doctor"),
        Example("", "vtpm rc 0x98e"),
        Example("", "vtpm clients /dev/vtpm0"),
        Example("", "vtpm trace tpm.pcapng"),
    ),
    see_also=("swtpm(8)",),
)


def main() -> int:
    """The program vtpm."""
    return run_program(_run, _report, clears_up=False)


def _run() -> int:
    return run_chosen(
        PROGRAM,
        sys.argv[1:],
        f"vtpm-cuse {__version__}",
        missing="vtpm: What is to be done? The first word says it.",
        unknown="vtpm: There is no command '{}'.",
    )


def _report(reason: str) -> None:
    complain(f"vtpm: {reason}")
