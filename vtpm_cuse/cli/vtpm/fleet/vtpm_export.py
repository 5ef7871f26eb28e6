"""``vtpm export``: a TPM of the manager's as a file."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING, Final

from vtpm_cuse.cli.vtpm.fleet.asking import (
    ENVIRONMENT,
    EXITS,
    HELP,
    NAME,
    SOCKET,
    as_json,
    ask,
    operands,
)
from vtpm_cuse.cli.words.front import run_command
from vtpm_cuse.cli.words.table import Example, Program, Term
from vtpm_cuse.errors import UsageError
from vtpm_cuse.files import flush, write_all

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vtpm_cuse.cli.words.commandline import CommandLine

PROGRAM: Final = Program(
    "vtpm export",
    "write a TPM of the manager's into a file",
    (SOCKET, HELP),
    usage=("[options] NAME FILE",),
    operands=(NAME, Term("FILE", "which is made, for its owner alone; - is standard output")),
    description=(
        "The TPM has to be stopped, and stays. The file has all that it is, but for its snapshots, "
        "and is as secret as the TPM; vtpm import has another manager take it. If both go on, they "
        "are one TPM to all others, and what one of them forgets the other one still knows: use "
        "vtpm rm where it is no longer to be.",
        "The file is JSON: the object archive of the manager's interface. Its permall is, in "
        "base64, the file tpm2-00.permall of the C suite, which swtpm can use; what is stored "
        "encrypted is so there, too.",
    ),
    examples=(
        Example("", "vtpm stop web1 && vtpm export web1 web1.vtpm"),
        Example("To another host", "vtpm export web1 - | ssh there vtpm import - && vtpm rm web1"),
        Example(
            "For swtpm", "vtpm export web1 - | jq -r .permall | base64 -d >state/tpm2-00.permall"
        ),
    ),
    exits=EXITS,
    environment=ENVIRONMENT,
    see_also=("vtpm(8)", "vtpm_import(8)", "vtpm_snapshot(8)"),
)

_MODE: Final = 0o600
_NEW: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def main(words: Sequence[str], program: str) -> int:
    """Runs ``vtpm export`` with the words behind it."""
    return run_command(PROGRAM, words, program, _run)


def _run(line: CommandLine) -> int:
    name, path = operands(line, "the TPM", "the file")
    text = as_json(ask(line, lambda manager: manager.export(name))) + "\n"
    if path == "-":
        sys.stdout.write(text)
        return 0
    try:
        _write(path, text.encode())
    except OSError as exc:
        raise UsageError(f"{path} cannot be written: {exc.strerror}") from exc
    return 0


def _write(path: str, data: bytes) -> None:
    """Into a new file. Raises OSError; there is none then."""
    fd = os.open(path, _NEW, _MODE)
    try:
        write_all(fd, data)
        flush(fd)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise
    finally:
        os.close(fd)
