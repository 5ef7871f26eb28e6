"""``swtpm_ioctl``: one PTM request to a running vTPM.

What a request needs is imported when it is made: ``--help`` comes at once.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Final

from vtpm_cuse.cli import controls
from vtpm_cuse.cli.ioctl_commands import COMMANDS, Asked, Command
from vtpm_cuse.cli.words.commandline import CommandLine
from vtpm_cuse.cli.words.help import help_text
from vtpm_cuse.cli.words.program import complain, run_program, version_text
from vtpm_cuse.cli.words.table import Example, Lenient, Option, Program, Term
from vtpm_cuse.cli.words.targets import split_tcp
from vtpm_cuse.errors import FrontendError, UsageError, WireError

if TYPE_CHECKING:
    from vtpm_cuse.cli.words.getopt import Given

_BUFFER_MAX: Final = 1 << 20

PROGRAM: Final = Program(
    "swtpm_ioctl",
    "control a running TPM emulator",
    (
        *(command.option for command in COMMANDS),
        *controls.OPTIONS,
        Option("version", "display the version and exit", ends=True),
        Option("help", "display this help and exit", ends=True),
    ),
    usage=("COMMAND DEVICE",),
    operands=(controls.OPERAND,),
    description=(
        "Sends one control request to a TPM that swtpm_cuse(8) serves as a character device, or "
        "whose control channel swtpm_socket(8) listens on, and shows the answer.",
    ),
    examples=(
        Example("", "swtpm_ioctl -c /dev/vtpm0"),
        Example("", "swtpm_ioctl -i /dev/vtpm0"),
        Example("", "echo data | swtpm_ioctl -h - --unix /run/vtpm0/ctrl.sock"),
        Example("", "swtpm_ioctl --save permanent vtpm0.permanent --tcp :6546"),
    ),
    environment=(
        Term("SWTPM_IOCTL_BUFFERSIZE", "Bytes of a state blob moved at once through a device."),
    ),
    see_also=("swtpm(8)", "swtpm_cuse(8)", "swtpm_socket(8)", "swtpm_ioctls(3)"),
    banner=version_text("control tool "),
    long_only=True,
    lenient=Lenient.UNKNOWN | Lenient.MISUSED,
)


def main() -> int:
    """The program swtpm_ioctl."""
    return run_program(lambda: _run(sys.argv[1:]), complain)


def _run(words: list[str]) -> int:
    commands = _Commands()
    line = CommandLine(PROGRAM, words, look_at=commands.look_at)
    if line.has("version"):
        print(PROGRAM.banner)
        return 0
    if line.has("help"):
        print(help_text(PROGRAM), end="")
        return 0
    if commands.given is None:
        raise UsageError("No valid command.")
    if not line.operands and not controls.is_named(line):
        raise UsageError("Error: Missing device name.")
    command, spelled, asked = commands.given
    with controls.connect(line, _buffer_size()) as tpm:
        if spelled != command.word:
            print(help_text(PROGRAM), end="")
            return 1
        try:
            command.run(tpm, asked)
        except OSError as exc:
            raise FrontendError(f"Could not execute {command.ptm}: {exc.strerror}") from exc
        except WireError as exc:
            raise FrontendError(f"Could not execute {command.ptm}: {exc}") from exc
    return 0


class _Commands:
    """The commands on a command line, of which there may be one."""

    def __init__(self) -> None:
        self.given: tuple[Command, str, Asked] | None = None

    def look_at(self, given: Given) -> None:
        """Takes a command with its values; looks at a place to connect to. Raises UsageError."""
        if given.name == "tcp":
            split_tcp(given.value or "", controls.DEFAULT_PORT)
        command = next((c for c in COMMANDS if c.option.name == given.name), None)
        if command is None:
            return
        if self.given is not None:
            raise UsageError("Only one command may be given.")
        if " " in command.option.metavar and given.second is None:
            raise UsageError(f"Missing filename argument for --{given.name} option")
        value = given.value or ""
        asked = Asked(value, command.read(value), given.second or "")
        self.given = command, given.spelled, asked


def _buffer_size() -> int:
    text = os.environ.get("SWTPM_IOCTL_BUFFERSIZE")
    if text is None:
        return 0
    from vtpm_cuse.cli.words.numbers import leading_number

    found = leading_number(text, base=10)
    return min(max(1, found[0]), _BUFFER_MAX) if found else 1
