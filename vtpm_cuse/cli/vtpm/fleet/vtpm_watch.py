"""``vtpm watch``: what happens to the TPMs of the manager."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from vtpm_cuse.cli.vtpm.fleet.asking import ENVIRONMENT, HELP, SOCKET, as_json, ask
from vtpm_cuse.cli.words.front import run_command
from vtpm_cuse.cli.words.table import Example, Option, Program, Term
from vtpm_cuse.errors import FrontendError, shown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vtpm_cuse.cli.words.commandline import CommandLine
    from vtpm_cuse.client.manager import Manager

PROGRAM: Final = Program(
    "vtpm watch",
    "what happens to the TPMs of the manager",
    (SOCKET, Option("json", "print an object for each, on a line of its own"), HELP),
    usage=("[options]",),
    description=(
        "Prints a line whenever a TPM of the user's, or for root and the manager's own user any "
        "TPM, is created, changed or removed: the time, which of these, its name and its state. "
        "It goes on until it is interrupted, or the manager ends.",
    ),
    examples=(
        Example("", "vtpm watch"),
        Example("", "vtpm watch --json | jq 'select(.tpm.state == \"failed\")'"),
    ),
    exits=(Term("1", "No manager answers, or it has ended."),),
    environment=ENVIRONMENT,
    see_also=("vtpm(8)", "vtpm_top(8)"),
)


def main(words: Sequence[str], program: str) -> int:
    """Runs ``vtpm watch`` with the words behind it."""
    return run_command(PROGRAM, words, program, _run, clears_up=False)


def _run(line: CommandLine) -> int:
    def request(manager: Manager) -> None:
        for event in manager.watch():
            if line.has("json"):
                print(as_json(event), flush=True)
                continue
            tpm = event.tpm
            said = f"{tpm.name} {tpm.failure or tpm.state}"
            print(shown(f"{time.strftime('%T')} {event.kind} {said}"), flush=True)

    ask(line, request)
    raise FrontendError("The manager does not go on with it", "start vtpm watch again")
