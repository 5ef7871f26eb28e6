"""``vtpm flush``: ends what a client of a TPM's resource manager has in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vtpm_cuse.cli import controls
from vtpm_cuse.cli.vtpm.vtpm_clients import ask, reach
from vtpm_cuse.cli.words.front import run_command
from vtpm_cuse.cli.words.table import Example, Option, Program, Term
from vtpm_cuse.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vtpm_cuse.cli.words.commandline import CommandLine
    from vtpm_cuse.client.clients import ClientsInfo

PROGRAM: Final = Program(
    "vtpm flush",
    "end what a client of a resource manager has in the TPM",
    (
        *controls.OPTIONS,
        Option("client", "the client, by its number in vtpm clients", metavar="NUMBER"),
        Option("help", "print this help and end", letter="h"),
    ),
    usage=("DEVICE HANDLE [--client NUMBER]", "DEVICE --client NUMBER"),
    operands=(
        controls.OPERAND,
        Term("HANDLE", "an object or session, as vtpm clients --handles has it"),
    ),
    description=(
        "Ends one object or session, or with --client alone all that this client has. It stays "
        "connected; what it does next with what is gone is refused. Sessions have one number for "
        "all clients, and those that are abandoned can be ended, too; an object's number is its "
        "client's, which --client has to name where several have it.",
    ),
    examples=(
        Example("", "vtpm flush /dev/vtpm0 0x02000001"),
        Example("", "vtpm flush --client 7 --unix /run/vtpm0/ctrl.sock 0x80000002"),
        Example("All that client 7 has", "vtpm flush /dev/vtpm0 --client 7"),
    ),
    exits=(
        Term("0", "It has ended."),
        Term("1", "There is no such thing, or the TPM cannot be reached."),
    ),
    see_also=("vtpm(8)", "vtpm_clients(8)"),
)

_NOBODYS: Final = 0
_ALL: Final = 0
_MOST: Final = 0xFFFF_FFFF


def main(words: Sequence[str], program: str) -> int:
    """Runs ``vtpm flush`` with the words behind it."""
    return run_command(PROGRAM, words, program, _run)


def _run(line: CommandLine) -> int:
    handles = line.operands if controls.is_named(line) else line.operands[1:]
    client = line.value("client")
    number = None if client is None else _number(client, "client")
    if len(handles) > 1 or (not handles and number is None):
        raise UsageError("Name one handle, or a client by --client")
    if not (controls.is_named(line) or line.operands):
        raise UsageError("Name one TPM: its device, or its control channel by --unix or --tcp")
    handle = _number(handles[0], "handle") if handles else _ALL
    from vtpm_cuse.client.clients import read_clients

    with reach(line) as tpm:
        found = read_clients(ask(tpm.clients))
        owner = _owner(found, handle, number)
        ask(lambda: tpm.flush_client(owner, handle))
    return 0


def _owner(found: ClientsInfo, handle: int, wanted: int | None) -> int:
    """Whose it is. Raises UsageError unless that is one client's, or abandoned."""
    if wanted is not None and wanted not in {one.number for one in found.clients}:
        raise UsageError(f"There is no client {wanted}", hint="vtpm clients lists them")
    owners = [
        one.number
        for one in found.clients
        if wanted in {None, one.number}
        and (handle == _ALL or handle in {held.handle for held in (*one.objects, *one.sessions)})
    ]
    if wanted is None and handle in {held.handle for held in found.abandoned}:
        owners.append(_NOBODYS)
    if len(owners) == 1:
        return owners[0]
    if owners:
        names = ", ".join(map(str, owners))
        raise UsageError(f"Clients {names} have an object 0x{handle:08x}; name one by --client")
    whose = "Nobody has" if wanted is None else f"Client {wanted} does not have"
    raise UsageError(f"{whose} 0x{handle:08x}", hint="vtpm clients --handles lists all")


def _number(text: str, what: str) -> int:
    """A number above 0. Raises UsageError."""
    from vtpm_cuse.cli.words.numbers import number

    found = number(text, 1, _MOST)
    if found is None:
        raise UsageError(f"'{text}' is no {what}")
    return found
