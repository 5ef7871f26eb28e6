"""``swtpm resource-manager``: many clients for a TPM that is not ours, a chip's say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vtpm_cuse.cli.emulator.manager_settings import manager_config
from vtpm_cuse.cli.emulator.options import options_of
from vtpm_cuse.cli.emulator.run import run_server
from vtpm_cuse.cli.words.table import Example, InterfaceName, Option, Program, Term
from vtpm_cuse.config import FuseConfig, SocketConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vtpm_cuse.cli.words.commandline import CommandLine


def _rows(interface: InterfaceName, *names: str) -> tuple[Option, ...]:
    return tuple(option for option in options_of(interface) if option.name in names)


PROGRAM: Final = Program(
    "swtpm resource-manager",
    "a resource manager for a TPM of the machine, in place of tpm2-abrmd",
    (
        Option(
            "tpm",
            "the TPM 2.0: a device of the kernel's, /dev/tpm0 or /dev/tpmrm0, or another one that "
            "takes commands as these do",
            metavar="DEVICE",
            more="Nobody else can open /dev/tpm0 meanwhile; /dev/tpmrm0 can still be used beside it.",
        ),
        Option(
            "flush-all",
            "at the start, end all objects and sessions that others have left in the TPM, saved "
            "ones too",
        ),
        Option(
            "exclusive",
            "keep everybody else from the TPM, also by way of /dev/tpmrm0, and the kernel itself; "
            "kernels that do not know how leave it at one program on /dev/tpm0",
        ),
        Option(
            "name",
            "name of the device to make, /dev/NAME; with --mount, of the file there",
            letter="n",
            metavar="NAME",
        ),
        Option(
            "mount",
            "make no device but a file, in this directory, which is empty, or made if it is missing",
            metavar="DIR",
        ),
        *_rows(InterfaceName.FUSE, "allow-other"),
        *_rows(InterfaceName.SOCKET, "managed", "managed-limits"),
        *_rows(InterfaceName.SOCKET, "ctrl", "daemon", "log", "pid", "pcap", "seccomp"),
        *_rows(InterfaceName.SOCKET, "runas", "help"),
        *_rows(InterfaceName.FUSE, "version"),
    ),
    description=(
        "Opens a TPM 2.0 that is not this program's, a chip's say, and serves any number of "
        "clients, each of which sees a TPM of its own: 64 objects and 16 sessions, unless "
        "--managed-limits says otherwise, and nobody else's. Clients open a device (--name), which takes /dev/cuse, or a file (--name with "
        "--mount), which takes no root, or connect to a socket (--managed).",
        "Over /dev/tpm0 it is the only program there, as tpm2-abrmd is. The kernel and its own "
        "manager, /dev/tpmrm0, still use the TPM, and need room in it: after a second without a "
        "command all objects of clients are taken out of it, and after a minute all sessions, so "
        "that what clients have outlives a sleep of the machine, too.",
        "Over /dev/tpmrm0 it is one of the kernel's clients: it has three objects and three "
        "sessions there at a time, which the kernel swaps at every command of anybody. So after "
        "each command it takes everything out. That costs time; prefer /dev/tpm0.",
        "What others have left in the TPM stays there, unless --flush-all is given. At its end "
        "the program ends what its clients have, behind a command that runs, for no device of the "
        "kernel's can be told to end one early. One that was killed leaves up to three objects, "
        "and its clients' sessions, of which the TPM has room for 64; --flush-all ends them.",
        "A client of a socket is its connection. tpm2-tss stays connected by its module cmd, as "
        "in the example; its module swtpm connects anew for each command, and so loses all that "
        "it has, unless --managed has per-process, of which swtpm_socket(8) says more. That one "
        "also wants a control channel (--ctrl), at the port behind the other, or at PATH.ctrl: "
        "SHUTDOWN ends this program, and no request reaches the TPM's power, state or locality.",
    ),
    examples=(
        Example(
            "In place of tpm2-abrmd: one socket for all programs",
            "sudo swtpm resource-manager --tpm /dev/tpm0 --daemon \\\n"
            "    --managed type=unixio,path=/run/tpm.sock,mode=0660\n"
            "sudo tpm2_getrandom -T 'cmd:nc -U /run/tpm.sock' --hex 8",
        ),
        Example(
            "As a device, for programs that know devices alone",
            "sudo swtpm resource-manager --tpm /dev/tpm0 -n vtpmrm9 --daemon\n"
            "sudo tpm2_getrandom -T device:/dev/vtpmrm9 --hex 8",
        ),
        Example(
            "As a file, without root, over the kernel's manager",
            "swtpm resource-manager --tpm /dev/tpmrm0 -n tpm --mount $HOME/tpm --daemon\n"
            "tpm2_getrandom -T device:$HOME/tpm/tpm --hex 8",
        ),
    ),
    exits=(
        Term("0", "It was ended in order, or goes on in the background."),
        Term("1", "Any error, or the TPM went away; standard error or the log has the reason."),
    ),
    files=(
        Term("/dev/tpm0", "The TPM, for one program at a time."),
        Term("/dev/tpmrm0", "The TPM with the kernel's resource manager."),
        Term("/dev/cuse", "The kernel's CUSE driver, for --name."),
        Term("/dev/fuse", "The kernel's FUSE driver, for --mount."),
    ),
    see_also=("swtpm(8)", "swtpm_ioctl(8)", "tpm2-abrmd(8)"),
)


def main(words: Sequence[str], program: str) -> int:
    """Runs ``swtpm resource-manager`` with the words behind it."""
    return run_server(PROGRAM, words, program, _serve)


def _serve(line: CommandLine) -> int:
    config = manager_config(line)
    if isinstance(config, SocketConfig):
        from vtpm_cuse.service import socket

        return socket.run(config)
    if isinstance(config, FuseConfig):
        from vtpm_cuse.service import fuse

        return fuse.run(config)
    from vtpm_cuse.service import cuse

    return cuse.run(config)
