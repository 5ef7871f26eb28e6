"""``swtpm-cuse``, ``swtpm_cuse`` and ``swtpm cuse``: a TPM on a CUSE character device."""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING, Final

from vtpm_cuse.cli import prints, settings
from vtpm_cuse.cli.commandline import CommandLine, CuseExit
from vtpm_cuse.cli.help import help_text
from vtpm_cuse.cli.options import Interface
from vtpm_cuse.cli.program import run_program, version_text
from vtpm_cuse.errors import UsageError
from vtpm_cuse.service import logs
from vtpm_cuse.service.config import LogConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vtpm_cuse.service.config import CuseConfig

log = logging.getLogger(__name__)

_CUSE_DEVICE: Final = "/dev/cuse"
_EXAMPLES: Final = """\
Make a TPM 2.0 that is ready at once, and use it:
  sudo swtpm-cuse -n vtpm0 --tpm2 --tpmstate dir=/var/lib/vtpm0 \\
      --flags startup-clear
  sudo tpm2_getrandom -T device:/dev/vtpm0 --hex 8
Make one and power it on by hand:
  sudo swtpm-cuse -n vtpm0 --tpm2 --tpmstate dir=/var/lib/vtpm0
  sudo swtpm_ioctl -i /dev/vtpm0
End the TPM and remove its device:
  sudo swtpm_ioctl -s /dev/vtpm0
"""


def main(words: Sequence[str] | None = None, program: str = "swtpm-cuse") -> int:
    """The program swtpm-cuse; ``swtpm cuse`` passes the words behind it."""
    logs.configure(LogConfig())  # until --log has been read
    return run_program(lambda: _run(sys.argv[1:] if words is None else words, program), log.error)


def _run(words: Sequence[str], program: str) -> int:
    line = CommandLine(Interface.CUSE, program, words)
    if line.has("help"):
        print(help_text(Interface.CUSE, program, _EXAMPLES), end="")
        return 0
    if line.has("version"):
        print(version_text("CUSE interface "))
        return 0
    flags = line.number("print-info", 0xFFFF_FFFF)
    logs.configure(settings.log_config(line))
    text = prints.asked_text(line)
    if text is None:
        config = settings.cuse_config(line)
        if not flags:
            return _serve(config)
        text = prints.info(flags, tpm2=config.vtpm.tpm2)
    print(text, end="")
    return 0


def _serve(config: CuseConfig) -> int:
    if os.path.exists(_CUSE_DEVICE) and not os.access(_CUSE_DEVICE, os.R_OK | os.W_OK):
        # PEER: refuses everybody but root, even for the print options.
        ids = f"uid = {os.getuid()}, euid = {os.geteuid()}, gid = {os.getgid()}"
        raise UsageError(
            f"Error: Unable to setuid root. {ids}", CuseExit.NOT_ROOT, hint="run it with sudo"
        )
    from vtpm_cuse.service import cuse

    return cuse.run(config)
