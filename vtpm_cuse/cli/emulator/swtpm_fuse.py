"""``swtpm fuse``: a TPM as a file in a FUSE mount."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vtpm_cuse.cli.emulator import prints, settings
from vtpm_cuse.cli.emulator.options import options_of
from vtpm_cuse.cli.emulator.run import run_emulator
from vtpm_cuse.cli.words.table import Example, InterfaceName, Program, Term

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vtpm_cuse.cli.words.commandline import CommandLine

PROGRAM: Final = Program(
    "swtpm fuse",
    "a TPM as a file in a FUSE mount, without root",
    options_of(InterfaceName.FUSE),
    description=(
        "Mounts a small file system with FUSE and serves a TPM as the file NAME in it: programs "
        "write TPM commands and read responses as on the kernel's /dev/tpm0, and swtpm_ioctl(8) "
        "works on it as on a device of swtpm-cuse(8). It needs neither root nor a kernel module "
        "but FUSE, and the program fusermount3. Without options, the TPM is a TPM 2.0 that is "
        "ready to use, and its state is kept in a directory of the user. No other user can use "
        "it, not even root, unless --allow-other is given.",
        "A TPM 2.0 has a second file, vtpmrm0 for vtpm0: as on the kernel's /dev/tpmrm0, each "
        "program that opens it has a TPM of its own, which no other one reaches.",
        "Beside the TPM are files to read, as the kernel shows them under /sys/class/tpm: "
        "tpm_version_major, caps, durations, timeouts, and for each PCR bank a directory such "
        "as pcr-sha256 with the files 0 to 23. The file log has the last messages, status the "
        "state of the program as JSON. A file that asks the TPM waits for a running command; "
        "it fails with EBUSY in the middle of a measurement by the platform or of a TPM 1.2's "
        "SHA-1 in several commands, and while a session is exclusive by its audit, all of which "
        "it would end. Of a TPM that goes on from a stored volatile state nobody can tell that, "
        "so there it fails until the first command.",
    ),
    examples=(
        Example(
            "A TPM 2.0, ready to use",
            "swtpm fuse -n vtpm0\n"
            "tpm2_getrandom -T device:$XDG_RUNTIME_DIR/vtpm/vtpm0 --hex 8\n"
            "cat $XDG_RUNTIME_DIR/vtpm/pcr-sha256/7",
        ),
        Example(
            "End it; so do fusermount3 -u and a signal",
            "swtpm_ioctl -s $XDG_RUNTIME_DIR/vtpm/vtpm0",
        ),
        Example(
            "Under a service manager",
            "swtpm fuse -n vtpm1 --mount $HOME/tpm --tpmstate dir=$HOME/tpmstate \\\n"
            "    --foreground",
        ),
    ),
    exits=(
        Term("0", "The TPM was ended in order, or goes on in the background."),
        Term("1", "Any error; standard error or the log has the reason."),
    ),
    environment=(
        Term("XDG_RUNTIME_DIR", "Where the directory vtpm is, if --mount is not given."),
        Term("TPM_PATH", "Directory of the state, if --tpmstate is not given."),
        Term("XDG_STATE_HOME", "Where that directory is otherwise, for others than root."),
    ),
    files=(
        Term("/dev/fuse", "The kernel's FUSE driver."),
        Term("/var/lib/vtpm-cuse/NAME", "The state of root's, if no other place is named."),
        Term("~/.local/state/vtpm-cuse/NAME", "Others' state, likewise."),
        Term("/etc/fuse.conf", "Says whether an ordinary user may give --allow-other."),
    ),
    see_also=("swtpm(8)", "swtpm_ioctl(8)", "fusermount3(1)"),
)


def main(words: Sequence[str], program: str) -> int:
    """Runs ``swtpm fuse`` with the words behind it."""
    return run_emulator(PROGRAM, words, program, _serve, _info)


def _info(line: CommandLine, flags: int) -> str:
    return prints.info(flags, tpm2=settings.is_tpm2(line))


def _serve(line: CommandLine) -> int:
    config = settings.fuse_config(line)
    from vtpm_cuse.service import fuse

    return fuse.run(config)
