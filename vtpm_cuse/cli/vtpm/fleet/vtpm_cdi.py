"""``vtpm cdi``: offers a TPM of the manager's to containers, or does so no more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vtpm_cuse.cli.vtpm.fleet.asking import ENVIRONMENT, EXITS, NAME, OPTIONS, ask, operands, tell
from vtpm_cuse.cli.words.front import run_command
from vtpm_cuse.cli.words.table import Example, Option, Program, Term
from vtpm_cuse.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vtpm_cuse.cli.words.commandline import CommandLine
    from vtpm_cuse.wire.manager import Offer

REMOVE: Final = Option("rm", "delete the TPM, with all its keys, when a container ends that had it")

PROGRAM: Final = Program(
    "vtpm cdi",
    "offer a TPM of the manager's to containers",
    (REMOVE, Option("off", "offer it no more"), *OPTIONS),
    usage=("[options] NAME",),
    operands=(NAME,),
    description=(
        "A container that is started with --device vtpm-cuse.org/vtpm=NAME finds the TPM at /dev/tpm0 "
        "and /dev/tpmrm0, where programs look for one; the TPM's id will do in the place of its name. "
        "The devices belong to the TPM's owner there, too, by his number, and to nobody else. Who "
        "can use /dev/tpm0 can also reset the TPM.",
        "The runtime of an ordinary user takes --device vtpm-cuse.org/rootless=NAME, for a TPM of his.",
        "For that the manager keeps documents of the Container Device Interface (CDI) in the folder "
        "that its --cdi says, while the TPM is on. It takes a TPM that is a device (vtpm create "
        "--interface cuse), and a runtime that reads these documents, as podman does since 3.2.0 and "
        "docker since 25.0.",
        "The TPM outlives the container. With --rm, the runtime has it deleted when a container ends "
        "that had it, also if that is to be started again; what the container itself has started "
        "before does not matter. Give such a TPM to one container at a time.",
        "Only root and the manager's user can offer a TPM.",
    ),
    examples=(
        Example(
            "",
            "sudo vtpm cdi web1 && sudo vtpm start web1\n"
            "sudo podman run --device vtpm-cuse.org/vtpm=web1 IMAGE PROGRAM",
        ),
    ),
    exits=EXITS,
    environment=ENVIRONMENT,
    files=(
        Term("/run/cdi/vtpm-cuse.org-vtpm_ID.json", "The document about the TPM with that id."),
        Term("/run/cdi/vtpm-cuse.org-rootless_ID.json", "The same, for containers without root."),
    ),
    see_also=("vtpm(8)", "vtpm_create(8)", "vtpmd(8)", "podman-run(1)"),
)


def main(words: Sequence[str], program: str) -> int:
    """Runs ``vtpm cdi`` with the words behind it."""
    return run_command(PROGRAM, words, program, _run)


def _run(line: CommandLine) -> int:
    (name,) = operands(line, "one TPM")
    if line.has("rm") and line.has("off"):
        raise UsageError("--rm and --off are two different wishes")
    offer: Offer = "off" if line.has("off") else offer_of(line)
    return tell(line, ask(line, lambda manager: manager.update(name, cdi=offer)))


def offer_of(line: CommandLine) -> Offer:
    """What `REMOVE` says of one that is offered."""
    return "remove" if line.has("rm") else "keep"
