"""``vtpm rc``: response codes of any layer, by name and in words."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from vtpm_cuse.cli.words.front import run_command
from vtpm_cuse.cli.words.table import Example, Option, Program, Term
from vtpm_cuse.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vtpm_cuse.cli.words.commandline import CommandLine
    from vtpm_cuse.wire.rc import Explained

PROGRAM: Final = Program(
    "vtpm rc",
    "what a TPM's response code means",
    (
        Option("tpm12", "the codes are a TPM 1.2's, whatever they look like"),
        Option("json", "print an object for each code, on a line of its own"),
        Option("help", "print this help and end", letter="h"),
    ),
    usage=("[options] CODE...",),
    operands=(Term("CODE", "a code as programs print it: 0x98e, 98e, 0000098e or 2446"),),
    description=(
        "Prints for each code who says it, its name in the specifications, which parameter, handle "
        "or session it is about, and what it means. It knows the codes of TPM 2.0, TPM 1.2 and "
        "the layers of the TSS, which are those that programs, libraries, resource managers and "
        "the Linux kernel report.",
        "Digits alone may be decimal, as the kernel prints them, or hexadecimal: what is a known code "
        "is printed, which may be both. With zeros in front they are hexadecimal.",
    ),
    examples=(
        Example("", "vtpm rc 0x98e"),
        Example("", "vtpm rc 0xb0143 a000a 2314"),
        Example("", "vtpm rc --json 0x922 | jq -r .name"),
    ),
    exits=(
        Term("0", "Every code has a name."),
        Term("1", "A word is no code, or there is none."),
        Term("2", "A code has no name; all others were explained."),
    ),
    see_also=("vtpm(8)", "vtpm_trace(8)"),
)

_HIGHEST: Final = 0xFFFF_FFFF
_NAMELESS: Final = 2


def main(words: Sequence[str], program: str) -> int:
    """Runs ``vtpm rc`` with the words behind it."""
    return run_command(PROGRAM, words, program, _run)


def _run(line: CommandLine) -> int:
    if not line.operands:
        raise UsageError("There is no code; write one as 0x98e")
    found = [(word, _explained(word, tpm12=line.has("tpm12"))) for word in line.operands]
    for word, codes in found:
        for code in codes:
            print(_as_json(word, code) if line.has("json") else _as_text(code))
    return 0 if all(code.name for _, codes in found for code in codes) else _NAMELESS


def _explained(word: str, *, tpm12: bool) -> list[Explained]:
    """What the word may mean: most often one thing. Raises UsageError."""
    from vtpm_cuse.wire.rc import explain

    numbers = _numbers(word)
    if not numbers or max(numbers) > _HIGHEST:
        raise UsageError(f"'{word}' is no response code; write it as 0x98e")
    found = [explain(number, tpm12=tpm12) for number in numbers]
    return [code for code in found if code.name] or found[:1]


def _numbers(word: str) -> list[int]:
    if re.fullmatch("[1-9][0-9]{0,9}", word):
        return list(dict.fromkeys((int(word), int(word, 16))))[: 2 if len(word) <= 8 else 1]
    if re.fullmatch("(0[xX])?[0-9a-fA-F]{1,16}", word):
        return [int(word, 16)]
    return []


def _as_text(code: Explained) -> str:
    name = ", ".join(filter(None, (code.name or "unknown", code.where)))
    layer = f" [{code.layer}]" if code.layer else ""
    return f"0x{code.code:x}{layer} {name}: {code.words}"


def _as_json(word: str, code: Explained) -> str:
    import json

    return json.dumps({"word": word, **code._asdict()})
