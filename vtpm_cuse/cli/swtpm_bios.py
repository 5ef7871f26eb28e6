"""``swtpm_bios``: starts a TPM as the BIOS of a computer does."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Final

from vtpm_cuse.cli.words.commandline import CommandLine
from vtpm_cuse.cli.words.help import help_text
from vtpm_cuse.cli.words.program import complain, inform, run_program, version_text
from vtpm_cuse.cli.words.table import Example, Lenient, Option, Program, Term
from vtpm_cuse.cli.words.targets import split_tcp
from vtpm_cuse.errors import FrontendError

if TYPE_CHECKING:
    from vtpm_cuse.cli.bios_steps import Startup, Step, Wanted
    from vtpm_cuse.cli.words.getopt import Given
    from vtpm_cuse.client.commands import TpmAddress

_DEFAULT_PORT: Final = 6545
_DEFAULT_DEVICE: Final = "/dev/tpm0"
_TPM_ERROR: Final = 0x80
_RESET_NEEDED: Final = 0x81
_NO_TPM: Final = 0xFF


def _switch(letters: str, text: str) -> Option:
    return Option(letters, text, single_dash=True)


PROGRAM: Final = Program(
    "swtpm_bios",
    "start a TPM as the BIOS of a computer does",
    (
        Option(
            "tpm-device",
            "use this character device, by default /dev/tpm0",
            metavar="DEVICE",
            group="TPM",
        ),
        Option(
            "tcp",
            "connect to this TCP port, by default 127.0.0.1:6545",
            metavar="[HOST]:[PORT]",
            group="TPM",
        ),
        Option("unix", "connect to this Unix socket", metavar="PATH", group="TPM"),
        Option("tpm2", "it is a TPM 2.0; otherwise a TPM 1.2", group="TPM"),
        _switch("c", "startup clear, the default"),
        _switch("s", "startup state"),
        _switch("d", "startup deactivated, TPM 1.2 only; nothing follows but -cs and -u"),
        _switch("n", "no startup"),
        _switch("o", "startup only: do not set presence, enable and activate"),
        _switch("cs", "run TPM_ContinueSelfTest, or TPM2_IncrementalSelfTest"),
        _switch("ea", "make sure that a TPM 1.2 is activated; status 129 if it needs a reset"),
        _switch("u", "give up physical presence, or give a TPM 2.0's platform a random password"),
        Option("v", "display the version and exit", single_dash=True, ends=True),
        Option("help", "display this help and exit", letter="h", ends=True),
    ),
    description=(
        "Sends a TPM the commands that firmware sends: startup, physical presence, enabling and "
        "activation of a TPM 1.2, and what the options ask for besides. Each command goes over "
        "a connection of its own.",
    ),
    examples=(
        Example("", "swtpm_bios --tpm2 --tpm-device /dev/vtpm0"),
        Example("", "swtpm_bios --tcp :6545 -cs -u"),
        Example("", "swtpm_bios --unix /run/vtpm0/data.sock -ea"),
    ),
    exits=(
        Term("0", "All commands succeeded."),
        Term("1", "An option is wrong."),
        Term("128", "The TPM answered at least one command with an error."),
        Term("129", "With -ea: the TPM needs a reset before it is active."),
        Term("255", "The TPM cannot be reached, does not answer in time, or answers nonsense."),
    ),
    environment=(
        Term("TPM_DEVICE", "The character device, if no option names a TPM."),
        Term("TCSD_USE_TCP_DEVICE", "If set, and no option names a TPM: connect to a TCP port."),
        Term("TCSD_TCP_DEVICE_HOSTNAME", "Host for that, by default localhost."),
        Term("TCSD_TCP_DEVICE_PORT", "Port for that, by default 6545."),
    ),
    see_also=("swtpm(8)", "swtpm_ioctl(8)"),
    banner=version_text("BIOS emulator "),
    long_only=True,
    lenient=Lenient.OPERANDS,
    shows_help=True,
)


def main() -> int:
    """The program swtpm_bios."""
    return run_program(lambda: _run(sys.argv[1:]), complain)


def _run(words: list[str]) -> int:
    from vtpm_cuse.cli.bios_steps import steps

    line = CommandLine(PROGRAM, words, look_at=_look_at)
    if line.has("help") or line.has("v"):
        # PEER: -v shows the help, too, and ends with status 1.
        print(help_text(PROGRAM) if line.has("help") else PROGRAM.banner + "\n", end="")
        return 0
    if line.has("u"):
        from vtpm_cuse.service.confine.secrecy import hide_process

        hide_process()  # before there is a password for the platform
    tpm2 = line.has("tpm2")
    try:
        return _send(_address(line), list(steps(_wanted(line), tpm2_=tpm2)), tpm2=tpm2)
    except FrontendError as exc:
        complain(str(exc))
        return _NO_TPM


def _look_at(given: Given) -> None:
    if given.name == "tcp":
        split_tcp(given.value or "", _DEFAULT_PORT)


def _wanted(line: CommandLine) -> Wanted:
    """The last of the options that choose a startup counts, and the last of -o and those."""
    from vtpm_cuse.cli.bios_steps import Wanted

    kinds: dict[str | None, Startup] = {None: "c", "c": "c", "s": "s", "d": "d", "n": "n"}
    startup = kinds[line.last_of("c", "s", "d", "n")]
    more = line.last_of("c", "s", "d", "n", "o") not in {"d", "o"}
    return Wanted(startup, more, line.has("cs"), line.has("ea"), line.has("u"))


def _address(line: CommandLine) -> TpmAddress:
    from vtpm_cuse.client.commands import TpmDevice, TpmTcp, TpmUnix

    device, tcp, unix = (line.value(name) for name in ("tpm-device", "tcp", "unix"))
    if device is not None:
        return TpmDevice(device)
    if tcp is not None:
        return TpmTcp(*split_tcp(tcp, _DEFAULT_PORT))
    if unix is not None:
        return TpmUnix(unix)
    if "TCSD_USE_TCP_DEVICE" in os.environ:
        host = os.environ.get("TCSD_TCP_DEVICE_HOSTNAME", "localhost")
        port = os.environ.get("TCSD_TCP_DEVICE_PORT", str(_DEFAULT_PORT))
        return TpmTcp(host, split_tcp(f":{port}", _DEFAULT_PORT)[1])
    return TpmDevice(os.environ.get("TPM_DEVICE", _DEFAULT_DEVICE))


def _send(address: TpmAddress, todo: list[Step], *, tpm2: bool) -> int:
    """Sends all steps and returns the exit status. Raises FrontendError."""
    from vtpm_cuse.cli.bios_steps import is_deactivated
    from vtpm_cuse.client.commands import send_command
    from vtpm_cuse.errors import WireError
    from vtpm_cuse.wire.tpm import response_code

    status, deactivated = 0, False
    for step in todo:
        response = send_command(address, step.command, step.seconds)
        if code := response_code(response):
            text = f"{step.name} returned error code 0x{code:08x}"
            if tpm2:
                inform(f"{text}\n")
            else:
                complain(text)
            status = _TPM_ERROR
        elif step.asks_flags:
            try:
                deactivated = is_deactivated(response)
            except WireError as exc:
                raise FrontendError("Malformed response.", str(exc)) from exc
        if step.activates and deactivated:
            inform("TPM requires a reset\n")
            return _RESET_NEEDED
    return status
