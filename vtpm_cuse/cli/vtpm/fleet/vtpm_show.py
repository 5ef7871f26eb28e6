"""``vtpm show``: all that the manager knows of a TPM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vtpm_cuse.cli.vtpm.fleet.asking import (
    ENVIRONMENT,
    EXITS,
    NAME,
    OPTIONS,
    as_json,
    ask,
    operands,
)
from vtpm_cuse.cli.vtpm.fleet.words import when
from vtpm_cuse.cli.words.columns import columns, user_name
from vtpm_cuse.cli.words.front import run_command
from vtpm_cuse.cli.words.table import Example, Program

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vtpm_cuse.cli.words.commandline import CommandLine
    from vtpm_cuse.wire.manager import Tpm

PROGRAM: Final = Program(
    "vtpm show",
    "what the manager knows of a TPM",
    OPTIONS,
    usage=("[options] NAME",),
    operands=(NAME,),
    description=(
        "The state is stopped; asleep or awake, when it is on and has no process or has one; "
        "starting; or failed, with the reason. Of the sockets, data takes commands of one client "
        "at a time, managed those of many, each with a TPM of its own, and control PTM requests; of "
        "devices, there is one for each kind of client. "
        "The generation rises whenever another process gets the TPM.",
    ),
    examples=(
        Example("", "vtpm show web1"),
        Example("Use it", 'eval "$(vtpm env --shell web1)"; tpm2_getrandom --hex 8'),
    ),
    exits=EXITS,
    environment=ENVIRONMENT,
    see_also=("vtpm(8)", "vtpm_ls(8)", "vtpm_env(8)"),
)


def main(words: Sequence[str], program: str) -> int:
    """Runs ``vtpm show`` with the words behind it."""
    return run_command(PROGRAM, words, program, _run)


def _run(line: CommandLine) -> int:
    (name,) = operands(line, "one TPM")
    tpm = ask(line, lambda manager: manager.describe(name))
    if line.has("json"):
        print(as_json(tpm))
    else:
        print(*columns(list(_rows(tpm))), sep="\n")
    return 0


def _rows(tpm: Tpm) -> Iterator[tuple[str, str]]:
    yield "name", tpm.name
    yield "id", tpm.id
    yield "owner", user_name(tpm.owner)
    yield "state", f"{tpm.state}: {tpm.failure}" if tpm.failure else tpm.state
    if tpm.pid is not None:
        yield "process", str(tpm.pid)
    yield "interface", tpm.interface
    if tpm.device is not None:
        yield "device", tpm.device
    if tpm.managed_device is not None:
        yield "managed device", tpm.managed_device
    if tpm.cdi in {"keep", "remove"}:
        ends = ", and deleted with its container" if tpm.cdi == "remove" else ""
        yield "offered as", f"vtpm-cuse.org/vtpm={tpm.name}{ends}"
    yield from tpm.sockets.items()
    yield "generation", str(tpm.generation)
    if tpm.encrypted:
        yield "state files", "encrypted"
    for name, count in tpm.counters.items():
        yield name, str(count)
    yield "last used", when(tpm.last_used)
    for key, value in tpm.labels.items():
        yield "label", f"{key}={value}"
