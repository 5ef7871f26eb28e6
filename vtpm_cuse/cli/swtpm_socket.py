"""``swtpm socket``: a TPM over TCP or Unix sockets."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from vtpm_cuse.cli import prints, settings
from vtpm_cuse.cli.commandline import CommandLine
from vtpm_cuse.cli.help import help_text
from vtpm_cuse.cli.options import Interface
from vtpm_cuse.cli.program import run_program
from vtpm_cuse.errors import PtmError
from vtpm_cuse.service import logs
from vtpm_cuse.service.config import LogConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vtpm_cuse.service.config import VtpmConfig

log = logging.getLogger(__name__)

_EXAMPLES: Final = """\
A TPM 2.0 for tpm2-tools:
  swtpm socket --tpm2 --tpmstate dir=$HOME/tpm --flags startup-clear \\
      --server type=tcp,port=2321 --ctrl type=tcp,port=2322
  tpm2_getrandom -T swtpm:port=2321 --hex 8
A TPM 2.0 for QEMU:
  swtpm socket --tpm2 --tpmstate dir=$HOME/tpm --ctrl type=unixio,path=$HOME/tpm.sock
  qemu-system-x86_64 -chardev socket,id=c,path=$HOME/tpm.sock \\
      -tpmdev emulator,id=t,chardev=c -device tpm-crb,tpmdev=t ...
"""


def main(words: Sequence[str], program: str) -> int:
    """Runs ``swtpm socket`` with the words behind it."""
    logs.configure(LogConfig())  # until --log has been read
    return run_program(lambda: _run(words, program), log.error)


def _run(words: Sequence[str], program: str) -> int:
    line = CommandLine(Interface.SOCKET, program, words)
    if line.has("help"):
        print(help_text(Interface.SOCKET, program, _EXAMPLES), end="")
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
