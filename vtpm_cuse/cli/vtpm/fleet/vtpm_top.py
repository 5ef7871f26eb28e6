"""``vtpm top``: the TPMs of the manager, again and again."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Final

from vtpm_cuse.cli.vtpm.fleet.asking import ENVIRONMENT, HELP, SOCKET, as_json, ask
from vtpm_cuse.cli.vtpm.fleet.words import table
from vtpm_cuse.cli.words.front import run_command
from vtpm_cuse.cli.words.table import Example, Option, Program, Term
from vtpm_cuse.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vtpm_cuse.cli.words.commandline import CommandLine
    from vtpm_cuse.client.manager import Manager
    from vtpm_cuse.wire.manager import Tpm

PROGRAM: Final = Program(
    "vtpm top",
    "the TPMs of the manager, the busiest first",
    (
        Option("interval", "seconds between two looks, by default 2", metavar="SECONDS"),
        Option("count", "end after so many looks", metavar="NUMBER"),
        SOCKET,
        Option("json", "print an array for each look, on a line of its own"),
        HELP,
    ),
    usage=("[options]",),
    description=(
        "Shows what vtpm ls prints, and how many commands a second each TPM has had since the last "
        "look. A terminal shows the newest alone, and as many TPMs as it has lines; elsewhere, "
        "tables follow each other. It goes on until it is interrupted.",
    ),
    examples=(Example("", "vtpm top"), Example("", "vtpm top --interval 60 --json >>tpms.log")),
    exits=(Term("0", "So many looks as --count says."), Term("1", "No manager answers.")),
    environment=ENVIRONMENT,
    see_also=("vtpm(8)", "vtpm_ls(8)", "vtpm_watch(8)"),
)

_CLEAR: Final = "\x1b[H\x1b[J"
_INTERVAL_SECONDS: Final = 2
_MOST: Final = 1_000_000


def main(words: Sequence[str], program: str) -> int:
    """Runs ``vtpm top`` with the words behind it."""
    return run_command(PROGRAM, words, program, _run, clears_up=False)


def _run(line: CommandLine) -> int:
    interval = _number(line, "interval") or _INTERVAL_SECONDS
    count = _number(line, "count")

    def request(manager: Manager) -> None:
        looks, before, then = 0, dict[str, int](), time.monotonic()
        while True:
            tpms, now = manager.list(), time.monotonic()
            _show(line, _by_rate(tpms, before, now - then))
            before, then = {tpm.id: tpm.counters.get("commands", 0) for tpm in tpms}, now
            looks += 1
            if looks == count:
                return
            time.sleep(interval)

    ask(line, request)
    return 0


def _number(line: CommandLine, name: str) -> int | None:
    """Raises UsageError."""
    from vtpm_cuse.cli.words.numbers import number

    text = line.value(name)
    found = None if text is None else number(text, 1, _MOST)
    if text is not None and found is None:
        raise UsageError(f"'{text}' of --{name} is no number from 1 to {_MOST}")
    return found


def _by_rate(
    tpms: Sequence[Tpm], before: dict[str, int], seconds: float
) -> list[tuple[Tpm, float]]:
    """With the commands a second, most first; at the first look there are none."""

    def rate(tpm: Tpm) -> float:
        commands = tpm.counters.get("commands", 0)
        return max(commands - before.get(tpm.id, commands), 0) / max(seconds, 1e-3)

    rated = ((tpm, rate(tpm)) for tpm in tpms)
    return sorted(rated, key=lambda one: (-one[1], -(one[0].last_used or 0), one[0].name))


def _show(line: CommandLine, rated: list[tuple[Tpm, float]]) -> None:
    tpms = [tpm for tpm, _ in rated]
    if line.has("json"):
        print(f"[{', '.join(map(as_json, tpms))}]", flush=True)
        return
    lines = list(table(tpms, [f"{rate:.1f}" for _, rate in rated]))
    if sys.stdout.isatty():
        import shutil

        size = shutil.get_terminal_size()
        cut = [text[: size.columns - 1] for text in lines[: size.lines - 1]]
        print(_CLEAR + "\n".join(cut), flush=True)
    else:
        print(*lines, "", sep="\n", flush=True)
