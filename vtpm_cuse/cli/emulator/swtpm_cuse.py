"""``swtpm-cuse``, ``swtpm_cuse`` and ``swtpm cuse``: a TPM on a CUSE character device."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Final

from vtpm_cuse.cli.emulator import prints, settings
from vtpm_cuse.cli.emulator.options import options_of
from vtpm_cuse.cli.emulator.run import run_emulator
from vtpm_cuse.cli.words.commandline import CuseExit
from vtpm_cuse.cli.words.table import Example, InterfaceName, Lenient, Program, Term
from vtpm_cuse.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vtpm_cuse.cli.words.commandline import CommandLine

_CUSE_DEVICE: Final = "/dev/cuse"
PROGRAM: Final = Program(
    "swtpm cuse",
    "a TPM as a character device in /dev",
    options_of(InterfaceName.CUSE),
    aliases=("swtpm-cuse", "swtpm_cuse"),
    description=(
        "Makes the character device /dev/NAME with the kernel's CUSE driver and serves a TPM "
        "through it: programs write TPM commands and read responses, and swtpm_ioctl(8) powers "
        "the TPM on and off. The kernel's own TPM driver is not involved.",
        "Needs read and write access to /dev/cuse, which root has; the module cuse must be "
        "loaded. With a name alone, the TPM is a TPM 2.0 that is ready at once, and its state is "
        "kept for that name. With --tpmstate or TPM_PATH all is as in the C suite: a TPM 1.2 "
        "without --tpm2, and off until swtpm_ioctl -i powers it on, or --flags startup-clear.",
    ),
    examples=(
        Example(
            "Make a TPM 2.0 that is ready at once, and use it",
            "sudo swtpm-cuse -n vtpm0\nsudo tpm2_getrandom -T device:/dev/vtpm0 --hex 8",
        ),
        Example(
            "Make one and power it on by hand",
            "sudo swtpm-cuse -n vtpm0 --tpm2 --tpmstate dir=/var/lib/vtpm0\n"
            "sudo swtpm_ioctl -i /dev/vtpm0",
        ),
        Example(
            "Many programs at once, each of which has a TPM of its own",
            "sudo swtpm-cuse -n vtpm0 --tpm2 --tpmstate dir=/var/lib/vtpm0 \\\n"
            "    --flags startup-clear --resource-manager\n"
            "sudo tpm2_createprimary -T device:/dev/vtpmrm0 -c primary.ctx",
        ),
        Example("End the TPM and remove its device", "sudo swtpm_ioctl -s /dev/vtpm0"),
    ),
    exits=(
        Term("0", "The TPM was ended in order, or goes on in the background."),
        Term("242 to 246", "No sandbox, not permitted to run as that user, or no pid file."),
        Term("251", "There is no such user."),
        Term("252", "No right to use /dev/cuse."),
        Term("253", "A value of an option does not fit."),
        Term("254", "No usable name of a device was given."),
        Term("255", "A number is out of range."),
        Term("1 and others", "Any other error; standard error or the log has the reason."),
    ),
    environment=(
        Term("TPM_PATH", "Directory of the state, if --tpmstate is not given."),
        Term("XDG_STATE_HOME", "Where that directory is otherwise, for others than root."),
    ),
    files=(
        Term("/dev/cuse", "The kernel's CUSE driver."),
        Term("/dev/NAME", "The TPM."),
        Term("/dev/vtpmrm0", "For vtpm0, the same TPM behind a resource manager, if there is one."),
        Term("/var/lib/vtpm-cuse/NAME", "Its state, if no other place is named."),
    ),
    see_also=("swtpm(8)", "swtpm_ioctl(8)", "swtpm_ioctls(3)"),
    lenient=Lenient.UNKNOWN,
    bad_number=CuseExit.BAD_VALUE,
    bad_value=CuseExit.BAD_SUBOPTION,
    no_user=CuseExit.NO_USER,
)


def main(words: Sequence[str] | None = None, program: str = "swtpm-cuse") -> int:
    """The program swtpm-cuse; ``swtpm cuse`` passes the words behind it."""
    words = sys.argv[1:] if words is None else words
    return run_emulator(PROGRAM, words, program, _serve, _info)


def _info(line: CommandLine, flags: int) -> str:
    return prints.info(flags, tpm2=settings.cuse_config(line).vtpm.tpm2)


def _serve(line: CommandLine) -> int:
    config = settings.cuse_config(line)
    if os.path.exists(_CUSE_DEVICE) and not os.access(_CUSE_DEVICE, os.R_OK | os.W_OK):
        # PEER: refuses everybody but root, even for the print options.
        ids = f"uid = {os.getuid()}, euid = {os.geteuid()}, gid = {os.getgid()}"
        raise UsageError(
            f"Error: Unable to setuid root. {ids}", CuseExit.NOT_ROOT, hint="run it with sudo"
        )
    from vtpm_cuse.service import cuse

    return cuse.run(config)
