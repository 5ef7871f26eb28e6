"""``swtpm chardev``: a TPM on a character device, or as a TPM device of the kernel's."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

from vtpm_cuse.cli.emulator import settings
from vtpm_cuse.cli.emulator.options import options_of
from vtpm_cuse.cli.emulator.run import run_emulator
from vtpm_cuse.cli.words.table import Example, InterfaceName, Program, Term

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vtpm_cuse.cli.words.commandline import CommandLine

PROGRAM: Final = Program(
    "swtpm chardev",
    "a TPM on a character device, or as a TPM device of the kernel's",
    options_of(InterfaceName.CHARDEV),
    description=(
        "With --vtpm-proxy the kernel makes a TPM device, which looks to every program, and to "
        "the kernel itself, as that of a TPM chip does: /dev/tpmN, for a TPM 2.0 /dev/tpmrmN "
        "with the kernel's resource manager, and the files below /sys/class/tpm. They appear "
        "when the kernel has tested the TPM, and end with this program. It needs the module "
        "tpm_vtpm_proxy and the capability CAP_SYS_ADMIN. Without further options the TPM is a "
        "TPM 2.0 that is ready at once, and its state is kept for its name, which is proxy0 if "
        "--name gives no other.",
        "Otherwise the TPM reads commands from a device, or from an open descriptor, and writes "
        "its responses there; the end of that is its own. Then all is as in the C suite: a TPM "
        "1.2 without --tpm2, and off until it is told otherwise.",
        "A control channel on a TCP port is open to every user of the machine, see "
        "swtpm_socket(8): prefer a Unix socket.",
    ),
    examples=(
        Example(
            "Make a TPM 2.0 that is a device of the kernel's, and use it",
            "sudo modprobe tpm_vtpm_proxy\n"
            "sudo swtpm chardev --vtpm-proxy --daemon --pid file=/run/vtpm0.pid\n"
            "sudo tpm2_getrandom -T device:/dev/tpmrm0 --hex 8",
        ),
        Example("Make a second one", "sudo swtpm chardev --vtpm-proxy -n proxy1 --daemon"),
        Example("End it and remove its device", "sudo sh -c 'kill $(cat /run/vtpm0.pid)'"),
    ),
    environment=(
        Term("TPM_PATH", "Directory of the state, if --tpmstate is not given."),
        Term("XDG_STATE_HOME", "Where that directory is otherwise, for others than root."),
    ),
    files=(
        Term("/dev/vtpmx", "Makes TPM devices."),
        Term("/dev/tpmN", "The TPM, for one program at a time."),
        Term("/dev/tpmrmN", "The TPM 2.0, for any number of programs."),
        Term("/var/lib/vtpm-cuse/NAME", "The state, if no other place is named."),
    ),
    see_also=("swtpm(8)", "swtpm_ioctl(8)", "swtpm_ioctls(3)"),
)


def main(words: Sequence[str], program: str) -> int:
    """Runs ``swtpm chardev`` with the words behind it."""
    return run_emulator(PROGRAM, words, program, _serve)


def _serve(line: CommandLine) -> int:
    from vtpm_cuse.service import chardev

    # Who reads it from a pipe waits for it.
    return chardev.run(settings.chardev_config(line), partial(print, flush=True))
