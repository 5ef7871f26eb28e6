"""``vtpm``: chooses what to do by its first word."""

from __future__ import annotations

import sys
from typing import Final

from vtpm_cuse import __version__
from vtpm_cuse.cli.words.front import run_chosen
from vtpm_cuse.cli.words.program import complain, run_program
from vtpm_cuse.cli.words.table import Example, Option, Program, Subcommand

_MANAGER: Final = "vtpm_cuse.cli.vtpm.fleet"
"""The commands that ask the manager of many TPMs."""

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
        Subcommand("attach", "what a machine is given for a TPM", f"{_MANAGER}.vtpm_attach"),
        Subcommand("cdi", "offer a TPM to containers", f"{_MANAGER}.vtpm_cdi"),
        Subcommand("clone", "make a TPM like another", f"{_MANAGER}.vtpm_clone"),
        Subcommand("create", "make a TPM", f"{_MANAGER}.vtpm_create"),
        Subcommand("export", "write a TPM into a file", f"{_MANAGER}.vtpm_export"),
        Subcommand("hibernate", "put a TPM to sleep", f"{_MANAGER}.vtpm_hibernate"),
        Subcommand("import", "take a TPM from a file", f"{_MANAGER}.vtpm_import"),
        Subcommand("logs", "what has happened to a TPM", f"{_MANAGER}.vtpm_logs"),
        Subcommand("ls", "the TPMs of the manager", f"{_MANAGER}.vtpm_ls"),
        Subcommand("metrics", "figures about the TPMs", f"{_MANAGER}.vtpm_metrics"),
        Subcommand("reset", "switch a TPM off and on", f"{_MANAGER}.vtpm_reset"),
        Subcommand("restore", "give a TPM the state of a snapshot", f"{_MANAGER}.vtpm_restore"),
        Subcommand("rm", "delete a TPM, for good", f"{_MANAGER}.vtpm_rm"),
        Subcommand("show", "what the manager knows of a TPM", f"{_MANAGER}.vtpm_show"),
        Subcommand("snapshot", "keep a copy of a TPM's state", f"{_MANAGER}.vtpm_snapshot"),
        Subcommand("start", "switch a TPM on", f"{_MANAGER}.vtpm_start"),
        Subcommand("stop", "shut a TPM down", f"{_MANAGER}.vtpm_stop"),
        Subcommand("top", "the TPMs of the manager, the busiest first", f"{_MANAGER}.vtpm_top"),
        Subcommand("tree", "the TPMs, as a folder to look at", f"{_MANAGER}.vtpm_tree"),
        Subcommand("wake", "wake a TPM", f"{_MANAGER}.vtpm_wake"),
        Subcommand("watch", "what happens to the TPMs of the manager", f"{_MANAGER}.vtpm_watch"),
    ),
    description=(
        "Runs commands with TPMs of their own, answers questions about TPMs, and asks the manager "
        "of many, vtpmd, for the one that is named. The first word chooses which; every command "
        "has a help screen and a manual page. To serve one TPM is what swtpm(8) does.",
    ),
    examples=(
        Example("", "vtpm run tpm2_getrandom --hex 8"),
        Example("", "vtpm doctor"),
        Example("", "vtpm rc 0x98e"),
        Example("", "vtpm clients /dev/vtpm0"),
        Example("", "vtpm trace tpm.pcapng"),
        Example("", "vtpm create web1 && vtpm start web1"),
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
