"""``swtpm``: chooses the interface by its first word."""

from __future__ import annotations

import sys

from vtpm_cuse.cli.program import run_program, version_text

_HELP = """\
TPM emulator with choice of interface.

Usage: swtpm socket|chardev|cuse [options]
       swtpm -v|--version
       swtpm -h|--help

  socket   TPM commands over TCP or Unix sockets, as QEMU and tpm2-tss use it
  chardev  TPM commands from a character device or the kernel's vTPM proxy
           (not built yet)
  cuse     a TPM as a character device in /dev

Use the --help option to see the help screen for each interface type.
Use the --version option to see version information.

Examples:
  swtpm socket --help
  sudo swtpm cuse -n vtpm0 --tpm2 --tpmstate dir=/var/lib/vtpm0
"""


def main() -> int:
    """The program swtpm."""
    return run_program(_run, _report)


def _run() -> int:
    match sys.argv[1:]:
        case []:
            return _refuse("Missing TPM interface type.")
        case ["-v" | "--version", *_]:
            print(version_text(""))
        case ["-h" | "--help", *_]:
            print(_HELP, end="")
        case ["cuse", *rest]:
            from vtpm_cuse.cli import swtpm_cuse

            return swtpm_cuse.main(rest, "swtpm cuse")
        case ["socket", *rest]:
            from vtpm_cuse.cli import swtpm_socket

            return swtpm_socket.main(rest, "swtpm socket")
        case ["chardev", *_]:
            _report("The interface 'chardev' is not built yet; there are 'socket' and 'cuse'")
            return 1
        case [name, *_]:
            return _refuse(f"Unsupported TPM interface type '{name}'.")
    return 0


def _refuse(reason: str) -> int:
    print(f"{reason}\n{_HELP}", end="", file=sys.stderr)
    return 1


def _report(reason: str) -> None:
    print(f"swtpm: {reason}", file=sys.stderr)
