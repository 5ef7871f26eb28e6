"""``swtpm_ioctl``: one PTM request to a running vTPM.

What a request needs is imported when it is made: ``--help`` comes at once.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Final

from vtpm_cuse.cli.ioctl_commands import COMMANDS, Asked, Command
from vtpm_cuse.cli.words.getopt import Complaint, Getopt, Operand
from vtpm_cuse.cli.words.help import help_text
from vtpm_cuse.cli.words.program import complain, run_program, version_text
from vtpm_cuse.cli.words.table import Example, Option, Program, Term
from vtpm_cuse.cli.words.targets import split_tcp
from vtpm_cuse.errors import FrontendError, UsageError, WireError

if TYPE_CHECKING:
    from vtpm_cuse.client.base import Control

_DEFAULT_PORT: Final = 6546
_BUFFER_MAX: Final = 1 << 20

PROGRAM: Final = Program(
    "swtpm_ioctl",
    "control a running TPM emulator",
    (
        *(command.option for command in COMMANDS),
        Option("tpm-device", "use this character device", metavar="DEVICE", group="Device"),
        Option(
            "tcp",
            "connect to a control channel, by default 127.0.0.1:6546",
            metavar="[HOST]:[PORT]",
            group="Device",
        ),
        Option(
            "unix", "connect to a control channel on a Unix socket", metavar="PATH", group="Device"
        ),
        Option("version", "display the version and exit"),
        Option("help", "display this help and exit"),
    ),
    usage=("COMMAND DEVICE",),
    operands=(Term("DEVICE", "the character device, or one of the options for it"),),
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
)


def main() -> int:
    """The program swtpm_ioctl."""
    return run_program(lambda: _run(sys.argv[1:]), complain)


def _run(words: list[str]) -> int:
    line = _Line(words)
    if line.answer:
        print(line.answer, end="")
        return 0
    command, asked = line.checked_command()
    with _connect(line.targets) as tpm:
        if line.spelled != command.word:
            print(help_text(PROGRAM), end="")
            return 1
        try:
            command.run(tpm, asked)
        except OSError as exc:
            raise FrontendError(f"Could not execute {command.ptm}: {exc.strerror}") from exc
        except WireError as exc:
            raise FrontendError(f"Could not execute {command.ptm}: {exc}") from exc
    return 0


class _Line:
    """The command line; complaints are printed as they arise."""

    def __init__(self, words: list[str]) -> None:
        self.answer = ""
        self.targets: dict[str, str] = {}
        self.spelled = ""
        self._command: Command | None = None
        self._asked = Asked()
        self._words = Getopt(PROGRAM.name, words, PROGRAM.options, long_only=True)
        for item in self._words:
            match item:
                case Complaint(text):
                    complain(text)
                case Operand(word):
                    self.targets.setdefault("operand", word)
                case (name, value, spelled):
                    self._take(name, value or "", spelled)
            if self.answer:
                return

    def checked_command(self) -> tuple[Command, Asked]:
        """The command. Raises UsageError without one, or without a target."""
        if self._command is None:
            raise UsageError("No valid command.")
        if not self.targets:
            raise UsageError("Error: Missing device name.")
        return self._command, self._asked

    def _take(self, name: str, value: str, spelled: str) -> None:
        if name == "version":
            self.answer = version_text("control tool ") + "\n"
        elif name == "help":
            self.answer = help_text(PROGRAM)
        elif name == "tcp":
            split_tcp(value, _DEFAULT_PORT)
            self.targets[name] = value
        elif name in {"tpm-device", "unix"}:
            self.targets[name] = value
        else:
            self._take_command(next(c for c in COMMANDS if c.option.name == name), value, spelled)

    def _take_command(self, command: Command, value: str, spelled: str) -> None:
        if self._command is not None:
            raise UsageError("Only one command may be given.")
        file = self._words.take_word() if " " in command.option.metavar else ""
        if file is None:
            raise UsageError(f"Missing filename argument for --{command.option.name} option")
        self._command, self.spelled = command, spelled
        self._asked = Asked(value, command.read(value), file)


def _connect(targets: dict[str, str]) -> Control:
    device = targets.get("tpm-device")
    if device is None and "tcp" in targets:
        from vtpm_cuse.client.channel import tcp_channel

        return tcp_channel(*split_tcp(targets["tcp"], _DEFAULT_PORT))
    if device is None and "unix" in targets:
        from vtpm_cuse.client.channel import unix_channel

        return unix_channel(targets["unix"])
    return _open_device(targets["operand"] if device is None else device)


def _open_device(path: str) -> Control:
    from vtpm_cuse.client.ioctl import DeviceControl

    try:
        return DeviceControl(path, _buffer_size())
    except OSError as exc:
        # The C suite's sentence, then the reason that it keeps to itself.
        raise FrontendError(f"Unable to open device '{path}'. {exc.strerror}") from exc


def _buffer_size() -> int:
    text = os.environ.get("SWTPM_IOCTL_BUFFERSIZE")
    if text is None:
        return 0
    from vtpm_cuse.cli.words.numbers import leading_number

    found = leading_number(text, base=10)
    return min(max(1, found[0]), _BUFFER_MAX) if found else 1
