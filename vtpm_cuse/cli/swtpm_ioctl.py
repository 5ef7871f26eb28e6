"""``swtpm_ioctl``: one PTM request to a running vTPM.

What a request needs is imported when it is made: ``--help`` comes at once.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Final

from vtpm_cuse.cli.getopt import Complaint, Getopt, LongOption, Operand
from vtpm_cuse.cli.ioctl_commands import COMMANDS, Asked, Command
from vtpm_cuse.cli.program import run_program, version_text
from vtpm_cuse.errors import FrontendError, UsageError, WireError

if TYPE_CHECKING:
    from vtpm_cuse.client.base import Control

_DEFAULT_PORT: Final = 6546

_TARGETS: Final = (
    ("tpm-device", "DEVICE", "use this character device"),
    ("tcp", "[HOST]:[PORT]", "connect to a control channel, by default 127.0.0.1:6546"),
    ("unix", "PATH", "connect to a control channel on a Unix socket"),
)
_EXAMPLES: Final = """\
Examples:
  swtpm_ioctl -c /dev/vtpm0
  swtpm_ioctl -i /dev/vtpm0
  echo data | swtpm_ioctl -h - --unix /run/vtpm0/ctrl.sock
  swtpm_ioctl --save permanent vtpm0.permanent --tcp :6546
"""


def main() -> int:
    """The program swtpm_ioctl."""
    return run_program(lambda: _run(sys.argv[1:]), _complain)


def _run(words: list[str]) -> int:
    line = _Line(words)
    if line.answer:
        print(line.answer, end="")
        return 0
    command, asked = line.checked_command()
    with _connect(line.targets) as tpm:
        if line.spelled != command.word:
            print(_help(), end="")
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
        options = [
            *(LongOption(command.name, bool(command.metavar)) for command in COMMANDS),
            *(LongOption(name, takes_value=True) for name, _, _ in _TARGETS),
            LongOption("version"),
            LongOption("help"),
        ]
        self._words = Getopt("swtpm_ioctl", words, options, long_only=True)
        for item in self._words:
            match item:
                case Complaint(text):
                    _complain(text)
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
            self.answer = _help()
        elif name == "tcp":
            _split_tcp(value)
            self.targets[name] = value
        elif name in {"tpm-device", "unix"}:
            self.targets[name] = value
        else:
            self._take_command(next(c for c in COMMANDS if c.name == name), value, spelled)

    def _take_command(self, command: Command, value: str, spelled: str) -> None:
        if self._command is not None:
            raise UsageError("Only one command may be given.")
        file = self._words.take_word() if " " in command.metavar else ""
        if file is None:
            raise UsageError(f"Missing filename argument for --{command.name} option")
        self._command, self.spelled = command, spelled
        self._asked = Asked(value, command.read(value), file)


def _connect(targets: dict[str, str]) -> Control:
    device = targets.get("tpm-device")
    if device is None and "tcp" in targets:
        from vtpm_cuse.client.channel import tcp_channel

        return tcp_channel(*_split_tcp(targets["tcp"]))
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
    from vtpm_cuse.cli.numbers import leading_number

    found = leading_number(text, base=10)
    return max(1, found[0]) if found else 1


def _split_tcp(target: str) -> tuple[str, int]:
    """Host and port. Raises UsageError."""
    host, colon, port = target.rpartition(":")
    if not colon:
        return target, _DEFAULT_PORT
    if not host and not port:
        return "127.0.0.1", _DEFAULT_PORT
    from vtpm_cuse.cli.numbers import leading_number

    found = leading_number(port, base=10)
    if found is None:
        raise UsageError(f"Invalid port '{port}'")
    if not 0 <= found[0] < 1 << 16:
        raise UsageError(f"Port '{port}' outside valid range.")
    return host.strip("[]") or "127.0.0.1", found[0]


def _help() -> str:
    rows = [
        *((f"--{name} {metavar}", text) for name, metavar, text in _TARGETS),
        *((f"{command.word} {command.metavar}", command.help) for command in COMMANDS),
        ("--version", "display the version and exit"),
        ("--help", "display this help and exit"),
    ]
    import textwrap

    table = "\n".join(
        textwrap.fill(f"{form:<22}: {text}", 79, subsequent_indent=" " * 24) for form, text in rows
    )
    return (
        f"{version_text('control tool ')}\n\nUsage: swtpm_ioctl COMMAND DEVICE\n\n"
        f"The following commands are supported:\n{table}\n\n{_EXAMPLES}"
    )


def _complain(text: str) -> None:
    print(text, file=sys.stderr)
