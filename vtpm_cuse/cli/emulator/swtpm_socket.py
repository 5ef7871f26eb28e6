"""``swtpm socket``: a TPM over TCP or Unix sockets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vtpm_cuse.cli.emulator import settings
from vtpm_cuse.cli.emulator.options import options_of
from vtpm_cuse.cli.emulator.run import run_emulator
from vtpm_cuse.cli.words.table import Example, InterfaceName, Program, Term

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vtpm_cuse.cli.words.commandline import CommandLine

PROGRAM: Final = Program(
    "swtpm socket",
    "a TPM over TCP or Unix sockets",
    options_of(InterfaceName.SOCKET),
    description=(
        "Serves a TPM to one client at a time: its commands come over the data channel "
        "(--server), and the control channel (--ctrl) powers the TPM on and off and moves its "
        "state, as swtpm_ioctl(8) and QEMU do. QEMU needs the control channel alone; it hands "
        "over the data channel by itself.",
        "A TCP port asks nobody who they are: every user of the machine, and of the network if "
        "bindaddr says so, can use the TPM, copy its state with all secrets, and end it. A Unix "
        "socket is open to those alone whom the permissions of its path let in: prefer it, or "
        "see to it that nobody else can reach the port, as in a container of its own. A client "
        "of a TCP port that does not begin with a TPM command or a request is turned away, so "
        "that no web page reaches the TPM through a browser.",
        "With per-process, a client of a Unix socket is a process, not a connection: all its "
        "connections share what it has, which ends with the process. So its next connection finds "
        "what the last one left, as tpm2-tss' module swtpm needs it, which connects anew for each "
        "command, and wants a control channel beside the socket, at PATH.ctrl. The kernel says "
        "which process connects: none that has its number later on, no child, and no process as "
        "another user or group reaches what it has; what it executes, or hands an open connection "
        "to, does. A process of a PID namespace beside this one is a client with each connection, "
        "as without per-process. Not for a socket that a proxy serves others by: to the kernel they "
        "are one process. Until it ends, a process that has left something counts as a client.",
    ),
    examples=(
        Example(
            "A TPM 2.0 for QEMU",
            "swtpm socket --tpm2 --tpmstate dir=$HOME/tpm --daemon \\\n"
            "    --ctrl type=unixio,path=$HOME/tpm.sock\n"
            "qemu-system-x86_64 -chardev socket,id=c,path=$HOME/tpm.sock \\\n"
            "    -tpmdev emulator,id=t,chardev=c -device tpm-crb,tpmdev=t ...",
        ),
        Example(
            "A TPM 2.0 for many programs at once, each of which has one of its own",
            "swtpm socket --tpm2 --tpmstate dir=$HOME/tpm --daemon \\\n"
            "    --flags startup-clear --managed type=unixio,path=$HOME/tpm.managed",
        ),
        Example(
            "A TPM 2.0 for programs that take a TCP port alone, as older tpm2-tools",
            "swtpm socket --tpm2 --tpmstate dir=$HOME/tpm --daemon \\\n"
            "    --flags startup-clear --server type=tcp,port=2321 \\\n"
            "    --ctrl type=tcp,port=2322\n"
            "tpm2_getrandom -T swtpm:port=2321 --hex 8",
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
    return run_emulator(PROGRAM, words, program, _serve)


def _serve(line: CommandLine) -> int:
    from vtpm_cuse.service import socket

    return socket.run(settings.socket_config(line))
