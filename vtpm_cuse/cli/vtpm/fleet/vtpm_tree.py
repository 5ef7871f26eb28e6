"""``vtpm tree``: shows the TPMs of the manager as folders with files."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from vtpm_cuse.cli.vtpm.fleet.asking import ENVIRONMENT, HELP, SOCKET
from vtpm_cuse.cli.words.front import run_command
from vtpm_cuse.cli.words.table import Example, Option, Program, Term
from vtpm_cuse.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vtpm_cuse.cli.words.commandline import CommandLine

_NAME: Final = "vtpm-tree"

PROGRAM: Final = Program(
    "vtpm tree",
    "the TPMs of the manager, as a folder to look at",
    (
        Option("allow-other", "let other users see their own TPMs; for root, or as fuse.conf says"),
        SOCKET,
        HELP,
    ),
    usage=("[options] [DIR]",),
    operands=(
        Term(
            "DIR",
            "an empty folder, made if it is missing; by default vtpm-tree in XDG_RUNTIME_DIR, and "
            "/run/vtpm-tree for root",
        ),
    ),
    description=(
        "Mounts a folder for each TPM of the user's, which nobody can write to, until it is unmounted "
        "or the command is ended by a signal. It takes pyfuse3 and fusermount3.",
        "In the folder of a TPM, what the manager knows is there at any time: state, owner, interface, "
        "device, managed_device, sockets, labels, generation, id, failure, log (what has happened to "
        "it), metrics, and status, which is all of it as JSON.",
        "The rest the TPM is asked, between two commands of its clients: caps, durations, timeouts, "
        "tpm_version_major and pcr-sha256/10, as the kernel has them under /sys/class/tpm, and ek.crt, "
        "the certificate of its endorsement key. For that no TPM is woken, nor kept awake: to read "
        "such a file of one that sleeps is EAGAIN, as while a client is in the middle of something or "
        "has an audit session that a question would end. Of one that is off or has failed it is EIO, and "
        "of what the TPM has not, ENOENT.",
    ),
    examples=(
        Example("", "vtpm tree ~/tpms & cat ~/tpms/web1/state ~/tpms/web1/pcr-sha256/10"),
        Example("", "openssl x509 -inform DER -in ~/tpms/web1/ek.crt -noout -subject"),
    ),
    exits=(
        Term("0", "It was unmounted, or ended by a signal."),
        Term("1", "It could not be mounted, or no manager answers."),
    ),
    environment=(
        *ENVIRONMENT,
        Term("NOTIFY_SOCKET", "Where a service manager waits for it to be ready."),
    ),
    files=(Term("/run/vtpm-tree", "Where root's is, as the unit vtpm-tree.service has it."),),
    see_also=("vtpm(8)", "vtpm_show(8)", "vtpm_logs(8)", "vtpm_metrics(8)"),
)


def main(words: Sequence[str], program: str) -> int:
    """Runs ``vtpm tree`` with the words behind it."""
    return run_command(PROGRAM, words, program, _run, clears_up=False)


def _run(line: CommandLine) -> int:
    from vtpm_cuse.tree.serving import serve

    if len(line.operands) > 1:
        raise UsageError("Name one folder")
    folder = os.path.abspath(line.operands[0]) if line.operands else _default()
    serve(folder, line.value("socket"), allow_other=line.has("allow-other"))
    return 0


def _default() -> str:
    """Raises UsageError."""
    folder = os.environ.get("XDG_RUNTIME_DIR", "")
    if os.geteuid() == 0:
        folder = "/run"
    if not os.path.isabs(folder):
        raise UsageError("XDG_RUNTIME_DIR names no folder", hint="name the one to mount on")
    return os.path.join(folder, _NAME)
