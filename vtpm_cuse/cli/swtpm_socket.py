"""``swtpm socket``: a TPM over TCP or Unix sockets."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from vtpm_cuse.cli import prints, settings
from vtpm_cuse.cli.commandline import CommandLine
from vtpm_cuse.cli.help import help_text
from vtpm_cuse.cli.options import options_of
from vtpm_cuse.cli.program import run_program
from vtpm_cuse.cli.table import Example, Interface, Program, Term
from vtpm_cuse.errors import PtmError
from vtpm_cuse.service import logs
from vtpm_cuse.service.config import LogConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vtpm_cuse.service.config import VtpmConfig

log = logging.getLogger(__name__)

PROGRAM: Final = Program(
    "swtpm socket",
    "a TPM over TCP or Unix sockets",
    options_of(Interface.SOCKET),
    description=(
        "Serves a TPM to one client at a time: its commands come over the data channel "
        "(--server), and the control channel (--ctrl) powers the TPM on and off and moves its "
        "state, as swtpm_ioctl(8) and QEMU do. QEMU needs the control channel alone; it hands "
        "over the data channel by itself.",
    ),
    examples=(
        Example(
            "A TPM 2.0 for tpm2-tools",
            "swtpm socket --tpm2 --tpmstate dir=$HOME/tpm --flags startup-clear \\\n"
            "    --server type=tcp,port=2321 --ctrl type=tcp,port=2322\n"
            "tpm2_getrandom -T swtpm:port=2321 --hex 8",
        ),
        Example(
            "A TPM 2.0 for QEMU",
            "swtpm socket --tpm2 --tpmstate dir=$HOME/tpm \\\n"
            "    --ctrl type=unixio,path=$HOME/tpm.sock\n"
            "qemu-system-x86_64 -chardev socket,id=c,path=$HOME/tpm.sock \\\n"
            "    -tpmdev emulator,id=t,chardev=c -device tpm-crb,tpmdev=t ...",
        ),
    ),
    environment=(
        Term("TPM_PATH", "Directory of the state, if --tpmstate is not given."),
        Term("TPM_PORT", "TCP port of the data channel, if --server names none."),
    ),
    see_also=("swtpm(8)", "swtpm_ioctl(8)", "swtpm_ioctls(3)"),
)


def main(words: Sequence[str], program: str) -> int:
    """Runs ``swtpm socket`` with the words behind it."""
    logs.configure(LogConfig())  # until --log has been read
    return run_program(lambda: _run(words, program), log.error)


def _run(words: Sequence[str], program: str) -> int:
    line = CommandLine(PROGRAM, words, program)
    if line.has("help"):
        print(help_text(PROGRAM, program), end="")
        return 0
    flags = line.number("print-info", 0xFFFF_FFFF)
    logs.configure(settings.log_config(line))
    text = prints.asked_text(line)
    if text is None:
        config = settings.socket_config(line)
        if not flags:
            from vtpm_cuse.service import socket

            return socket.run(config)
        try:
            text = _info(flags, config.vtpm)
        except PtmError:  # said by the vTPM itself
            return 1
    print(text, end="")
    return 0


def _info(flags: int, config: VtpmConfig) -> str:
    """``--print-info``. With a state location of the TPM there, which is made if there is none.

    Raises:
        VtpmError: There is no such TPM to be had.
    """
    if config.state is None:
        return prints.info(flags, tpm2=config.tpm2)
    from vtpm_cuse.service.compose import make_vtpm

    vtpm = make_vtpm(config)
    try:
        vtpm.start()
        return vtpm.engine.info(flags) + "\n"
    finally:
        vtpm.close()
