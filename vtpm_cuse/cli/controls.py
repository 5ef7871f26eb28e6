"""The options that say how a running vTPM is controlled: its device, or its control channel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vtpm_cuse.cli.words.table import Option, Term
from vtpm_cuse.cli.words.targets import split_tcp
from vtpm_cuse.errors import FrontendError

if TYPE_CHECKING:
    from vtpm_cuse.cli.words.commandline import CommandLine
    from vtpm_cuse.client.base import Control

DEFAULT_PORT: Final = 6546

OPTIONS: Final = (
    Option("tpm-device", "use this character device", metavar="DEVICE", group="Device"),
    Option(
        "tcp",
        "connect to a control channel, by default 127.0.0.1:6546",
        metavar="[HOST]:[PORT]",
        group="Device",
    ),
    Option("unix", "connect to a control channel on a Unix socket", metavar="PATH", group="Device"),
)
OPERAND: Final = Term("DEVICE", "the character device, or one of the options for it")


def is_named(line: CommandLine) -> bool:
    """Whether one of the options was given."""
    return line.last_of(*(option.name for option in OPTIONS)) is not None


def connect(line: CommandLine, buffer_size: int = 0) -> Control:
    """The vTPM that the options name, or else the first operand, of which there is one.

    Args:
        line: The command line.
        buffer_size: As `DeviceControl` has it.

    Raises:
        FrontendError: It cannot be reached.
        UsageError: It is named by no address.
    """
    device, tcp, unix = (line.value(option.name) for option in OPTIONS)
    if device is None and tcp is not None:
        from vtpm_cuse.client.channel import tcp_channel

        return tcp_channel(*split_tcp(tcp, DEFAULT_PORT))
    if device is None and unix is not None:
        from vtpm_cuse.client.channel import unix_channel

        return unix_channel(unix)
    path = line.operands[0] if device is None else device
    from vtpm_cuse.client.ioctl import DeviceControl

    try:
        return DeviceControl(path, buffer_size)
    except OSError as exc:
        # The C suite's sentence, then the reason that it keeps to itself.
        raise FrontendError(f"Unable to open device '{path}'. {exc.strerror}") from exc
