"""``swtpm``: chooses the interface by its first word."""

from __future__ import annotations

import sys
from typing import Final

from vtpm_cuse.cli.words.front import run_chosen
from vtpm_cuse.cli.words.program import complain, run_program, version_text
from vtpm_cuse.cli.words.table import Example, Option, Program, Subcommand

PROGRAM: Final = Program(
    "swtpm",
    "TPM emulator with choice of interface",
    (
        Option("version", "print the version and end", letter="v"),
        Option("help", "print this help and end; each interface has its own", letter="h"),
    ),
    usage=("INTERFACE [options]", "-v|--version", "-h|--help"),
    subcommands=(
        Subcommand(
            "socket",
            "TPM commands over TCP or Unix sockets, as QEMU and tpm2-tss use it",
            "vtpm_cuse.cli.emulator.swtpm_socket",
        ),
        Subcommand(
            "chardev",
            "TPM commands from a character device, or a TPM device of the kernel's",
            "vtpm_cuse.cli.emulator.swtpm_chardev",
        ),
        Subcommand(
            "cuse", "a TPM as a character device in /dev", "vtpm_cuse.cli.emulator.swtpm_cuse"
        ),
        Subcommand(
            "doctor",
            "what this machine offers, and what to type next",
            "vtpm_cuse.cli.swtpm_doctor",
        ),
        Subcommand(
            "fuse",
            "a TPM as a file in a FUSE mount, without root",
            "vtpm_cuse.cli.emulator.swtpm_fuse",
        ),
        Subcommand(
            "resource-manager",
            "many clients for a TPM of the machine",
            "vtpm_cuse.cli.emulator.swtpm_resource_manager",
        ),
    ),
    description=(
        "Runs a virtual TPM 1.2 or TPM 2.0 on libtpms, in user space. The first word chooses "
        "how the TPM can be reached; every interface has a help screen and a manual page.",
    ),
    examples=(
        Example("", "swtpm socket --help"),
        Example("", "sudo swtpm cuse -n vtpm0"),
        Example("", "swtpm fuse -n vtpm0"),
    ),
    see_also=("swtpm_ioctl(8)",),
    banner="TPM emulator with choice of interface.",
)


def main() -> int:
    """The program swtpm."""
    return run_program(_run, _report, clears_up=False)


def _run() -> int:
    return run_chosen(
        PROGRAM,
        sys.argv[1:],
        version_text(""),
        missing="Missing TPM interface type.",
        unknown="Unsupported TPM interface type '{}'.",
    )


def _report(reason: str) -> None:
    complain(f"swtpm: {reason}")
