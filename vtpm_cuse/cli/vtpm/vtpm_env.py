"""``vtpm env``: by which variables clients find a TPM of ``vtpm run``."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Final

from vtpm_cuse.cli.words.front import run_command
from vtpm_cuse.cli.words.table import Example, Option, Program, Term
from vtpm_cuse.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vtpm_cuse.cli.words.commandline import CommandLine
    from vtpm_cuse.lab.running import Running

PROGRAM: Final = Program(
    "vtpm env",
    "how to reach a TPM that vtpm run has started",
    (
        Option("shell", 'print commands for a shell: eval "$(vtpm env --shell)"'),
        Option("json", "print an object"),
        Option("list", "print the TPMs that run, a line each: name, version, process id"),
        Option("help", "print this help and end", letter="h"),
    ),
    usage=("[options] [NAME]",),
    operands=(Term("NAME", "what vtpm run calls it; without it, the only one that runs"),),
    description=(
        "Prints the environment variables by which clients find a TPM of this user's, as vtpm run "
        "sets them for its command: without an option NAME=VALUE, a line each. With --json and "
        "--list it is an array.",
    ),
    examples=(
        Example(
            "In another terminal",
            'vtpm run --name try --shell\neval "$(vtpm env --shell try)"; tpm2_getrandom --hex 8',
        ),
        Example("", "vtpm env --json try | jq -r .env.VTPM_PATH"),
        Example("", "vtpm env --list"),
    ),
    exits=(
        Term("0", "It runs; or the list was printed, be it empty."),
        Term("1", "There is none, or none of that name, or NAME has to say which."),
    ),
    environment=(Term("XDG_RUNTIME_DIR, TMPDIR", "Where it looks, as well as in /tmp."),),
    see_also=("vtpm_run(8)",),
)


def main(words: Sequence[str], program: str) -> int:
    """Runs ``vtpm env`` with the words behind it."""
    return run_command(PROGRAM, words, program, _run)


def _run(line: CommandLine) -> int:
    if len(line.operands) > 1:
        raise UsageError("Name one TPM")
    from vtpm_cuse.lab.running import running

    found = running()
    if line.operands:
        found = [one for one in found if one.name == line.operands[0]]
    if line.has("list"):
        print(_list(found, as_json=line.has("json")), end="")
        return 0
    one = _only(found, line.operands)
    if line.has("json"):
        print(json.dumps(one._asdict()))
    else:
        print(*_lines(one, for_shell=line.has("shell")), sep="\n")
    return 0


def _only(found: list[Running], named: list[str]) -> Running:
    """Raises UsageError."""
    if len(found) == 1:
        return found[0]
    if not found:
        which = f"TPM {named[0]}" if named else "TPM"
        raise UsageError(f"No {which} of this user's runs here; start one with vtpm run")
    names = ", ".join(f"{one.name} (process {one.pid})" for one in found)
    raise UsageError(f"Several TPMs run: {names}; name one")


def _list(found: list[Running], *, as_json: bool) -> str:
    if as_json:
        return json.dumps([one._asdict() for one in found]) + "\n"
    return "".join(f"{one.name} {one.version} {one.pid}\n" for one in found)


def _lines(one: Running, *, for_shell: bool) -> list[str]:
    if for_shell:
        return [f"export {name}={shlex.quote(value)}" for name, value in one.env.items()]
    return [f"{name}={value}" for name, value in one.env.items()]
