"""``vtpm attach``: what a virtual machine or a container is given, so that it has a TPM of the manager's."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Final
from xml.sax.saxutils import quoteattr

from vtpm_cuse.cli.vtpm.fleet.asking import ENVIRONMENT, EXITS, HELP, NAME, SOCKET, ask, operands
from vtpm_cuse.cli.words.front import run_command
from vtpm_cuse.cli.words.table import Example, Option, Program
from vtpm_cuse.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vtpm_cuse.cli.words.commandline import CommandLine
    from vtpm_cuse.wire.manager import Tpm

_KINDS: Final = ("qemu", "libvirt", "podman")

PROGRAM: Final = Program(
    "vtpm attach",
    "what a virtual machine or a container is given for a TPM of the manager's",
    (
        Option("to", "who is to have it; by default qemu", metavar="KIND", choices=_KINDS),
        SOCKET,
        HELP,
    ),
    usage=("[options] NAME",),
    operands=(NAME,),
    description=(
        "Prints options for the command line of QEMU or of podman (and docker), or the element tpm "
        "for a domain of libvirt, since version 9.0. Nothing that runs is changed: neither QEMU nor a "
        "container takes a TPM later than at its start.",
        "What it names stays while the TPM has its name. Before the machine or the container is "
        "started, the TPM has to be, and who runs that has to be the TPM's owner, or root. A TPM with "
        "sockets is for virtual machines; QEMU stops it when the machine ends. One that is a device "
        "is for both, and stays on.",
    ),
    examples=(
        Example("", 'eval qemu-system-x86_64 ... "$(vtpm attach web1)"'),
        Example(
            "",
            "vtpm attach --to libvirt web1 |\n    virsh attach-device --config DOMAIN /dev/stdin",
        ),
        Example("", 'eval podman run "$(vtpm attach --to podman web2)" IMAGE'),
    ),
    exits=EXITS,
    environment=ENVIRONMENT,
    see_also=("vtpm(8)", "vtpm_cdi(8)", "vtpm_env(8)", "qemu(1)", "virsh(1)", "podman-run(1)"),
)


def main(words: Sequence[str], program: str) -> int:
    """Runs ``vtpm attach`` with the words behind it."""
    return run_command(PROGRAM, words, program, _run)


def _run(line: CommandLine) -> int:
    (name,) = operands(line, "one TPM")
    kind = line.value("to") or _KINDS[0]
    if kind not in _KINDS:
        raise UsageError(f"'{kind}' of --to is none of {', '.join(_KINDS)}")
    tpm = ask(line, lambda manager: manager.describe(name))
    if not tpm.sockets and not (tpm.device and tpm.managed_device):
        raise UsageError(f"{tpm.name} has no device yet; type 'vtpm start {tpm.name}' first")
    match kind:
        case "qemu":
            print(shlex.join(_qemu(tpm)))
        case "libvirt":
            print(_libvirt(tpm))
        case "podman":
            print(shlex.join(_podman(tpm)))
    return 0


def _model(tpm: Tpm) -> str:
    """A device has commands of 4,096 bytes, which QEMU's CRB has no room for."""
    return "tpm-tis" if tpm.device else "tpm-crb"


def _qemu(tpm: Tpm) -> list[str]:
    """A comma in a path is written twice."""
    device = ["-device", f"{_model(tpm)},tpmdev=tpm0"]
    if tpm.device:
        path = tpm.device.replace(",", ",,")
        return ["-tpmdev", f"passthrough,id=tpm0,path={path},cancel-path=/dev/null", *device]
    path = tpm.sockets["control"].replace(",", ",,")
    channel = ["-chardev", f"socket,id=chrtpm,path={path}"]
    return [*channel, "-tpmdev", "emulator,id=tpm0,chardev=chrtpm", *device]


def _libvirt(tpm: Tpm) -> str:
    kind, inside = "passthrough", f"<device path={quoteattr(tpm.device or '')}/>"
    if not tpm.device:
        path = quoteattr(tpm.sockets["control"])
        kind, inside = "external", f"<source type='unix' mode='connect' path={path}/>"
    return f"<tpm model='{_model(tpm)}'>\n  <backend type='{kind}'>{inside}</backend>\n</tpm>"


def _podman(tpm: Tpm) -> list[str]:
    """Raises UsageError."""
    if tpm.cdi in {"keep", "remove"}:
        return ["--device", f"vtpm-cuse.org/vtpm={tpm.name}"]
    if tpm.interface == "fuse":
        kind = "--volume"
    elif tpm.device:
        kind = "--device"
    else:
        hint = "make one with --interface cuse"
        raise UsageError(f"{tpm.name} is no device, as a container needs one", hint=hint)
    return [
        *(kind, f"{tpm.device}:/dev/tpm0:rw"),
        *(kind, f"{tpm.managed_device}:/dev/tpmrm0:rw"),
    ]
