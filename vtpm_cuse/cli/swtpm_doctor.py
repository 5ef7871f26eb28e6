"""``swtpm doctor``, ``vtpm doctor``: what this machine offers to virtual TPMs, and the next command to type."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

from vtpm_cuse.cli.words.front import run_command
from vtpm_cuse.cli.words.table import Example, Option, Program, Term
from vtpm_cuse.errors import shown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vtpm_cuse.cli.words.commandline import CommandLine
    from vtpm_cuse.service.doctor import Diagnosis

PROGRAM: Final = Program(
    "swtpm doctor",
    "what this machine offers to virtual TPMs",
    (
        Option("json", "print the findings as JSON, for scripts"),
        Option("help", "print this help and end", letter="h"),
    ),
    aliases=("vtpm doctor",),
    description=(
        "Looks at kernel modules, device nodes and permissions, libtpms and its known flaws, FUSE, "
        "sandboxing and the kernel lab, changes nothing, and ends with the next command to type.",
        "Each finding has a state: ok; loadable, for a kernel module that root can load; denied, "
        "for what is there but not for this user; missing; flawed, for a libtpms that has a known "
        "flaw, or perhaps has one: the text says how that is known. What keeps a way to serve a TPM "
        "from working is named with it.",
    ),
    examples=(
        Example("", "swtpm doctor"),
        Example("", "swtpm doctor --json | jq -r .next"),
    ),
    exits=(
        Term("0", "A TPM can be served in at least one way."),
        Term("1", "It cannot; the next command says what to do first."),
    ),
    files=(
        Term("/dev/cuse", "The kernel's CUSE driver."),
        Term("/dev/vtpmx", "The kernel's vTPM proxy."),
    ),
    see_also=("swtpm(8)", "vtpm(8)", "swtpm_cuse(8)", "swtpm_socket(8)"),
)

_MARKS: Final = {"ok": "+", "loadable": "o", "denied": "!", "missing": "-", "flawed": "!"}


def main(words: Sequence[str], program: str) -> int:
    """Runs ``swtpm doctor`` with the words behind it."""
    return run_command(PROGRAM, words, program, _run)


def _run(line: CommandLine) -> int:
    from vtpm_cuse.service.doctor import Machine, diagnose

    diagnosis = diagnose(Machine())
    print(_as_json(diagnosis) if line.has("json") else shown(_as_text(diagnosis)))
    return 0 if diagnosis.healthy else 1


def _as_json(diagnosis: Diagnosis) -> str:
    return json.dumps(
        {
            "findings": {
                name: {"state": str(state), "detail": detail, "command": command}
                for name, state, detail, command in diagnosis.findings
            },
            "interfaces": {
                offer.interface: {
                    "works": offer.works,
                    "obstacle": offer.obstacle,
                    "command": offer.command,
                }
                for offer in diagnosis.offers
            },
            "next": diagnosis.next,
        },
        indent=2,
    )


def _as_text(diagnosis: Diagnosis) -> str:
    lines = []
    for name, state, detail, command in diagnosis.findings:
        lines.append(f"{_MARKS[state]} {name:<20} {detail}")
        if command:
            lines.append(f"  {'':<20} -> {command}")
    lines += ["", "A TPM can be served as"]
    for offer in diagnosis.offers:
        why = f" ({offer.obstacle})" if offer.obstacle else ""
        lines.append(f"{'+' if offer.works else '-'} {offer.interface:<20} {offer.what}{why}")
    return "\n".join([*lines, "", "Next:", f"  {diagnosis.next}"])
