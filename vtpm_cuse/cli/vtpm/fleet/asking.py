"""How a command finds the manager, asks it, and says what it has answered."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Final, TypeVar

from vtpm_cuse.cli.words.front import run_command
from vtpm_cuse.cli.words.keys import KEY
from vtpm_cuse.cli.words.table import Option, Program, Term, TpmTerm
from vtpm_cuse.config import KeySource
from vtpm_cuse.errors import FleetError, UsageError, shown

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vtpm_cuse.cli.words.commandline import CommandLine
    from vtpm_cuse.client.manager import Manager
    from vtpm_cuse.wire.manager import Archive, Event, Key, Note, Tpm

    Answer = TypeVar("Answer")

SOCKET: Final = Option(
    "socket", "ask the manager at this Unix socket; by default VTPM_MANAGER says it", metavar="PATH"
)
HELP: Final = Option("help", "print this help and end", letter="h")
OPTIONS: Final = (SOCKET, Option("json", "print an object, the TPM as it is then"), HELP)
_KEPT: Final = ("file", "pwdfile", "credential")
_GIVEN: Final = ("fd", "pwdfd", "keyring")
_HOW: Final = ("mode", "format", "kdf")
OWNER: Final = Option("owner", "the user that it is for, by name or number", metavar="USER")
KEY_OPTION: Final = Option(
    "key",
    "where the manager finds the key that encrypts what is stored of it; or, with fd, pwdfd and "
    "keyring, where this command does, here and at each start",
    noun="key",
    subs=tuple(sub for sub in KEY if sub.name in {*_KEPT, *_GIVEN, *_HOW}),
)
GIVEN_KEY_OPTION: Final = Option(
    "key",
    "the key of a TPM whose key is kept nowhere",
    noun="key",
    subs=tuple(sub for sub in KEY if sub.name in {*_GIVEN, *_HOW}),
)
INTERFACES: Final = ("socket", "fuse", "cuse", "vtpm-proxy")
INTERFACE_OPTION: Final = Option(
    "interface",
    "how clients are to reach it; by default socket",
    metavar="KIND",
    choices=INTERFACES,
)
NAME: Final = TpmTerm("NAME", "the TPM, or its id")
SNAPSHOT: Final = Term("SNAPSHOT", "what the copy is called")
EXITS: Final = (
    Term("0", "It is done."),
    Term("1", "It is not, for the reason that is printed, or no manager answers."),
)
ENVIRONMENT: Final = (
    Term("VTPM_MANAGER", "The manager's socket."),
    Term(
        "XDG_RUNTIME_DIR",
        "Without that: the user's own manager is at vtpmd/manager.sock in this folder, if there is "
        "one; root's is at /run/vtpm/manager.sock.",
    ),
)

_NEXT: Final = {
    "NoSuchTpm": "'vtpm ls' lists those that there are",
    "TpmExists": "choose another name",
}
"""What to do about a refusal; for others, the manager's reason says it."""


def ask(line: CommandLine, request: Callable[[Manager], Answer]) -> Answer:
    """What *request* gives.

    Raises:
        UsageError: The manager refuses.
        FrontendError: There is none.
    """
    from vtpm_cuse.client.manager import Manager

    try:
        with Manager(line.value("socket")) as manager:
            return request(manager)
    except FleetError as exc:
        raise UsageError(str(exc), hint=_NEXT.get(exc.fault, "")) from exc


def operands(line: CommandLine, *what: str) -> list[str]:
    """The operands, one for each of *what*. Raises UsageError."""
    if len(line.operands) != len(what):
        raise UsageError(f"Name {' and '.join(what)}")
    return line.operands


def change(
    table: Program,
    words: Sequence[str],
    program: str,
    request: Callable[..., Tpm],
    *what: str,
) -> int:
    """Runs a command that changes a TPM and tells what it is then.

    Args:
        table: The command's table.
        words: What follows its name.
        program: How it was called.
        request: Is given the manager and the operands.
        what: The operands, as `operands` has them; by default one TPM alone.

    Returns:
        The exit status.
    """

    def work(line: CommandLine) -> int:
        names = operands(line, *(what or ("one TPM",)))
        return tell(line, ask(line, lambda manager: request(manager, *names)))

    return run_command(table, words, program, work)


def key_of(line: CommandLine) -> Key | None:
    """What `KEY_OPTION` says; a path is one of this process'. Raises UsageError."""
    from vtpm_cuse.wire.manager import Key

    if (given := line.subs("key")) is None:
        return None
    source = KeySource(
        fd=given.integer("fd"),
        pwdfd=given.integer("pwdfd"),
        keyring=given.text("keyring"),
        mode=given.text("mode") or KeySource().mode,
        format=given.text("format") or KeySource().format,
        kdf=given.text("kdf") or KeySource().kdf,
    )
    kept = {name: text for name in _KEPT if (text := given.text(name)) is not None}
    if not source.is_given:
        if kept:
            raise UsageError("A key is kept somewhere, or is given, and not both")
        return Key(secret=_read_key(source), mode=source.mode)
    for name in {"file", "pwdfile"} & kept.keys():
        kept[name] = os.path.abspath(kept[name])
    how = {name: text for name in _HOW if (text := given.text(name)) is not None}
    return Key(**kept, **how)


def _read_key(source: KeySource) -> str:
    """In base64. Raises UsageError."""
    from base64 import b64encode

    from vtpm_cuse.service.keys import check_source, open_key

    check_source(source)
    return b64encode(open_key(source).secret).decode()


def interface_of(line: CommandLine) -> str | None:
    """What `INTERFACE_OPTION` says. Raises UsageError."""
    found = line.value("interface")
    if found not in (None, *INTERFACES):
        raise UsageError(f"'{found}' of --interface is none of {', '.join(INTERFACES)}")
    return found


def tell(line: CommandLine, tpm: Tpm) -> int:
    """Prints what a TPM is now; returns the exit status."""
    print(as_json(tpm) if line.has("json") else shown(f"{tpm.name}: {tpm.failure or tpm.state}"))
    return 0


def as_json(value: Tpm | Event | Archive | Note) -> str:
    """As the manager's interface has it."""
    from vtpm_cuse.wire.varlink import to_json

    return json.dumps(to_json(value))
