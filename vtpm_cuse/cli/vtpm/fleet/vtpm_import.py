"""``vtpm import``: a TPM from a file becomes one of the manager's."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Final

from vtpm_cuse.cli.vtpm.fleet.asking import (
    ENVIRONMENT,
    EXITS,
    INTERFACE_OPTION,
    KEY_OPTION,
    OPTIONS,
    OWNER,
    ask,
    interface_of,
    key_of,
    tell,
)
from vtpm_cuse.cli.words.front import run_command
from vtpm_cuse.cli.words.table import Example, Program, Term
from vtpm_cuse.errors import UsageError
from vtpm_cuse.files import open_to_read

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vtpm_cuse.cli.words.commandline import CommandLine
    from vtpm_cuse.wire.manager import Archive

PROGRAM: Final = Program(
    "vtpm import",
    "have the manager take a TPM from a file",
    (OWNER, KEY_OPTION, INTERFACE_OPTION, *OPTIONS),
    usage=("[options] FILE [NAME]",),
    operands=(
        Term("FILE", "as vtpm export has written it; - is standard input"),
        Term("NAME", "what it is to be called, by default as it was"),
    ),
    description=(
        "The TPM is stopped then. It has the id, the seeds and the keys that it had, so it is "
        "refused where it is already; to have two of them, on two hosts say, is to have one whose "
        "secrets nobody can take back. Where its state is encrypted, --key says by what. How clients "
        "reach it is no part of the file: --interface says it, as for vtpm create.",
    ),
    examples=(
        Example("", "vtpm import web1.vtpm && vtpm start web1"),
        Example("", "vtpm import --key file=/root/web1.key web1.vtpm web7"),
        Example("As a device", "sudo vtpm import --interface cuse web1.vtpm"),
    ),
    exits=EXITS,
    environment=ENVIRONMENT,
    see_also=("vtpm(8)", "vtpm_export(8)", "vtpm_create(8)"),
)

_SIZE_MAX: Final = 1 << 20


def main(words: Sequence[str], program: str) -> int:
    """Runs ``vtpm import`` with the words behind it."""
    return run_command(PROGRAM, words, program, _run)


def _run(line: CommandLine) -> int:
    if not 1 <= len(line.operands) <= 2:
        raise UsageError("Name the file, and perhaps what the TPM is to be called")
    path, *names = line.operands
    owner, interface = line.user("owner"), interface_of(line)
    key, archive = key_of(line), _read(path)
    name = names[0] if names else None
    return tell(
        line,
        ask(
            line,
            lambda manager: manager.import_tpm(
                archive, name=name, owner=owner, key=key, interface=interface
            ),
        ),
    )


def _read(path: str) -> Archive:
    """Raises UsageError."""
    from vtpm_cuse.wire.manager import Archive
    from vtpm_cuse.wire.varlink import BadParameter, from_json

    try:
        if path == "-":
            data = sys.stdin.buffer.read(_SIZE_MAX)
        else:
            with open(open_to_read(path, streams=True), "rb") as file:
                data = file.read(_SIZE_MAX)
        found = json.loads(data)
    except OSError as exc:
        raise UsageError(f"{path} cannot be read: {exc.strerror}") from exc
    except (ValueError, RecursionError) as exc:
        raise UsageError(f"{path} is no archive of a TPM: it is no JSON, or not whole") from exc
    try:
        if not isinstance(found, dict):
            raise BadParameter("the object")
        return from_json(Archive, found)
    except BadParameter as exc:
        raise UsageError(f"{path} is no archive of a TPM: its {exc} is none") from exc
