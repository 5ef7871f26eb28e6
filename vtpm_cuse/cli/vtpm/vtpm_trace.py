"""``vtpm trace``: the commands and responses in a packet capture, a line each."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Final

from vtpm_cuse.cli.words.front import run_command
from vtpm_cuse.cli.words.program import complain
from vtpm_cuse.cli.words.table import Example, Option, Program, Term
from vtpm_cuse.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vtpm_cuse.cli.words.commandline import CommandLine
    from vtpm_cuse.wire.pcapng import CaptureReader, Exchange

PROGRAM: Final = Program(
    "vtpm trace",
    "the TPM commands of a packet capture, readable",
    (
        Option("json", "print an object for each command, on a line of its own"),
        Option("help", "print this help and end", letter="h"),
    ),
    usage=("[options] FILE",),
    operands=(Term("FILE", "a capture of format pcapng, or - for standard input"),),
    description=(
        "Prints each command with its handles, sessions and sizes, and its response with the code "
        "by name, in words where it is an error, and the time it took. Captures are what the "
        "emulator's option --pcap writes, and those of others with TPM commands on TCP port 2321.",
        "Nothing secret is printed: of parameters, passwords, HMACs and nonces there is the size "
        "alone. What is printed of parameters is what the command is about: the capability that "
        "is asked for, PCRs that are read, an NV index, a handle.",
        "Times are UTC; in JSON, micros are microseconds since 1970, duration is in microseconds, "
        "and sizes are in bytes.",
    ),
    examples=(
        Example("", "vtpm trace tpm.pcapng"),
        Example("As it is written", "tail -c +1 -f tpm.pcapng | vtpm trace -"),
        Example(
            "What failed",
            "vtpm trace --json tpm.pcapng | jq 'select(.response.result.code != 0)'",
        ),
    ),
    exits=(
        Term("0", "The capture was read to its end."),
        Term("1", "It cannot be read, or is no capture."),
        Term("2", "It is cut off or damaged; what was readable was printed."),
    ),
    see_also=("vtpm(8)", "vtpm_rc(8)", "swtpm_socket(8)"),
)

_PIECE: Final = 1 << 16
_DAMAGED: Final = 2


def main(words: Sequence[str], program: str) -> int:
    """Runs ``vtpm trace`` with the words behind it."""
    # Ctrl-C just ends it: Python would not hear of one that comes right before a read.
    return run_command(PROGRAM, words, program, lambda line: _run(line, program), clears_up=False)


def _run(line: CommandLine, program: str) -> int:
    if len(line.operands) != 1:
        raise UsageError("Name one capture, or - for standard input")
    (path,) = line.operands
    from vtpm_cuse.wire.pcapng import CaptureReader

    reader = CaptureReader()
    fd = _open(path)
    try:
        found = _show(_exchanges(reader, fd, path), as_json=line.has("json"))
    finally:
        os.close(fd)
    if reader.trouble:
        complain(f"{program}: {path}: {reader.trouble}")
        return _DAMAGED if reader.packets else 1
    if not found:
        complain(f"{program}: {path}: no TPM command is in it, of {reader.packets} packets")
    return 0


def _open(path: str) -> int:
    if path == "-":
        if sys.stdin.isatty():
            raise UsageError("Standard input is a terminal; name a capture, or give one to it")
        return os.dup(0)
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (OSError, ValueError) as exc:
        why = exc.strerror if isinstance(exc, OSError) else "no file has such a name"
        raise UsageError(f"Could not read {path}: {why}") from exc


def _exchanges(reader: CaptureReader, fd: int, path: str) -> Iterator[list[Exchange]]:
    """What is complete with each piece of the file. Raises UsageError."""
    while not reader.trouble and (data := _read(fd, path)):
        yield reader.feed(data)
    yield reader.end()


def _read(fd: int, path: str) -> bytes:
    try:
        return os.read(fd, _PIECE)
    except OSError as exc:
        raise UsageError(f"Could not read {path}: {exc.strerror}") from exc


def _show(pieces: Iterator[list[Exchange]], *, as_json: bool) -> int:
    """Prints them as they come; returns how many there were."""
    from vtpm_cuse.wire import trace

    count = 0
    for piece in pieces:
        for micros, command, response, duration in piece:
            record = trace.decode(command, response, micros=micros, duration=duration)
            print(json.dumps(trace.as_json(record)) if as_json else trace.text(record))
        sys.stdout.flush()
        count += len(piece)
    return count
