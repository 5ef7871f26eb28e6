"""``vtpm env``: by which variables clients find a TPM of ``vtpm run``, or of the manager's."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Final

from vtpm_cuse.cli.vtpm.fleet.asking import ENVIRONMENT, HELP, SOCKET, ask
from vtpm_cuse.cli.words.front import run_command
from vtpm_cuse.cli.words.table import Example, Option, Program, Term, TpmTerm
from vtpm_cuse.errors import FrontendError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vtpm_cuse.cli.words.commandline import CommandLine
    from vtpm_cuse.lab.running import Running

PROGRAM: Final = Program(
    "vtpm env",
    "how to reach a TPM of vtpm run, or of the manager",
    (
        Option("shell", 'print commands for a shell: eval "$(vtpm env --shell)"'),
        Option("json", "print an object"),
        Option("list", "print those of vtpm run, a line each: name, version, process id"),
        SOCKET,
        HELP,
    ),
    usage=("[options] [NAME]",),
    operands=(
        TpmTerm(
            "NAME", "what vtpm run or vtpm create calls it; without it, the only one of vtpm run"
        ),
    ),
    description=(
        "Prints the environment variables by which clients find a TPM of this user's, as vtpm run "
        "sets them for its command: without an option NAME=VALUE, a line each. With --json and "
        "--list it is an array.",
        "Where vtpm run has none of this name, the manager is asked for its TPM; of one that is "
        "there, too, --socket says that the manager's is meant. Its TPM wakes for its first "
        "client, so it need not be awake, but started.",
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
    environment=(
        Term(
            "XDG_RUNTIME_DIR, TMPDIR", "Where it looks for those of vtpm run, as well as in /tmp."
        ),
        *ENVIRONMENT,
    ),
    see_also=("vtpm_run(8)", "vtpm_start(8)"),
)


def main(words: Sequence[str], program: str) -> int:
    """Runs ``vtpm env`` with the words behind it."""
    return run_command(PROGRAM, words, program, _run)


def _run(line: CommandLine) -> int:
    if len(line.operands) > 1:
        raise UsageError("Name one TPM")
    from vtpm_cuse.lab.running import running

    found = [] if line.has("socket") else running()
    if line.operands:
        (name,) = line.operands
        found = [one for one in found if one.name == name] or _of_manager(line, name)
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


def _of_manager(line: CommandLine, name: str) -> list[Running]:
    """It, if there is a manager that has it. Raises UsageError unless it is on."""
    from vtpm_cuse.lab.running import Running
    from vtpm_cuse.lab.tpm import TCTI_VARIABLES, tcti_of

    try:
        tpms = ask(line, lambda manager: manager.list())
    except FrontendError:
        if line.has("socket"):
            raise
        return []
    for tpm in tpms:
        if name not in {tpm.name, tpm.id}:
            continue
        if tpm.state == "stopped":
            raise UsageError(f"{tpm.name} is stopped; type 'vtpm start {tpm.name}' first")
        path = tpm.managed_device or tpm.sockets["managed"]
        raw = tpm.device or tpm.sockets["data"]
        tcti = f"device:{path}" if tpm.managed_device else tcti_of(path)
        env = {"VTPM_NAME": tpm.name, "VTPM_PATH": path, "VTPM_RAW_PATH": raw}
        return [Running(tpm.name, "2.0", None, env | dict.fromkeys(TCTI_VARIABLES, tcti))]
    return []


def _list(found: list[Running], *, as_json: bool) -> str:
    if as_json:
        return json.dumps([one._asdict() for one in found]) + "\n"
    return "".join(f"{one.name} {one.version} {one.pid}\n" for one in found)


def _lines(one: Running, *, for_shell: bool) -> list[str]:
    if for_shell:
        return [f"export {name}={shlex.quote(value)}" for name, value in one.env.items()]
    return [f"{name}={value}" for name, value in one.env.items()]
