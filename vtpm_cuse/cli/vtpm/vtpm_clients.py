"""``vtpm clients``: who uses a TPM through its resource manager, and what each has in it."""

from __future__ import annotations

import errno
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vtpm_cuse.cli import controls
from vtpm_cuse.cli.words.columns import columns, duration, user_name
from vtpm_cuse.cli.words.front import run_command
from vtpm_cuse.cli.words.table import Example, Option, Program, Term
from vtpm_cuse.errors import AnswerError, FrontendError, UsageError, WireError, shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from typing import TypeVar

    from vtpm_cuse.cli.words.commandline import CommandLine
    from vtpm_cuse.client.base import Control
    from vtpm_cuse.client.clients import ClientInfo, ClientsInfo, Held

    Answer = TypeVar("Answer")

PROGRAM: Final = Program(
    "vtpm clients",
    "who uses a TPM through its resource manager",
    (
        *controls.OPTIONS,
        Option("handles", "list every object and session, too"),
        Option("json", "print an object with all of it"),
        Option("help", "print this help and end", letter="h"),
    ),
    usage=("[options] DEVICE",),
    operands=(controls.OPERAND,),
    description=(
        "Prints a line for each client of a TPM's resource manager (--resource-manager, --managed, "
        "the second file of a mount): its number, how it came, process and user where they are "
        "known, seconds since it came and since its last command, and how many commands it has "
        "given, and objects and sessions it has. Of these, those in brackets are not in the TPM at "
        "the moment but swapped out, or saved by the client.",
        "DEVICE is the TPM's own, not that of the clients: who may use that, or the control "
        "channel, owns the TPM, and sees all; a client sees itself alone. While somebody has a "
        "device open, it cannot be asked.",
        "A process is the one that has connected; it may have handed its connection on. From "
        "another PID namespace it is not seen. In JSON, an abandoned session is one that a client "
        "saved and left for others to load, swaps and refreshes are counted from the last reset, "
        "and limits are those of one client.",
    ),
    examples=(
        Example("", "vtpm clients /dev/vtpm0"),
        Example("", "vtpm clients --handles --unix /run/vtpm0/ctrl.sock"),
        Example(
            "Who has most objects",
            "vtpm clients --json /dev/vtpm0 |\n"
            "    jq '.clients | max_by(.objects | length) | {client, pid, uid}'",
        ),
    ),
    exits=(
        Term("0", "The clients were printed, be there none."),
        Term("1", "The TPM cannot be reached, or has no resource manager."),
    ),
    see_also=("vtpm(8)", "vtpm_flush(8)", "swtpm_ioctl(8)"),
)

_HEAD: Final = (
    *("CLIENT", "CHANNEL", "PID", "USER", "CONNECTED", "IDLE", "COMMANDS"),
    *("OBJECTS", "SESSIONS"),
)
_BAD_ORDINAL: Final = 0xA  # wire.ptm.PtmResult, whose import nobody waits for


def main(words: Sequence[str], program: str) -> int:
    """Runs ``vtpm clients`` with the words behind it."""
    return run_command(PROGRAM, words, program, _run)


def _run(line: CommandLine) -> int:
    if len(line.operands) + controls.is_named(line) != 1:
        raise UsageError("Name one TPM: its device, or its control channel by --unix or --tcp")
    from vtpm_cuse.client.clients import read_clients

    with reach(line) as tpm:
        text = ask(tpm.clients)
    found = read_clients(text)
    if line.has("json"):
        print(shown(text))
        return 0
    print(*_table(found), sep="\n")
    if line.has("handles"):
        print("", *_handles(found), sep="\n")
    return 0


def reach(line: CommandLine) -> Control:
    """As `cli.controls.connect`, and behind the C suite's sentence what to make of it."""
    try:
        return controls.connect(line)
    except FrontendError as exc:
        path = line.value("unix")
        if path is None or exc.hint or not isinstance(exc.__cause__, OSError):
            raise
        raise FrontendError(exc.reason, _cure(path, exc.__cause__.errno)) from exc


def _cure(path: str, error: int | None) -> str:
    if error == errno.ENOENT:
        return f"there is no socket '{path}'; a vTPM makes it with --ctrl type=unixio,path={path}"
    if error != errno.ECONNREFUSED:
        return ""
    return (
        f"nobody serves '{path}' any more" if Path(path).is_socket() else f"'{path}' is no socket"
    )


def ask(request: Callable[[], Answer]) -> Answer:
    """What *request* gives. Raises FrontendError, with what to do where there is no manager."""
    try:
        return request()
    except OSError as exc:
        reason = f"It does not tell of clients: {exc.strerror}"
        raise FrontendError(reason, _ONE_OF_THEM if exc.errno in _UNKNOWN else "") from exc
    except WireError as exc:
        raise FrontendError(f"It does not tell of clients: {exc}") from exc
    except AnswerError as exc:
        if exc.result != _BAD_ORDINAL:
            raise
        raise FrontendError("This TPM has no resource manager", _START_ONE) from exc


def _table(found: ClientsInfo) -> Iterator[str]:
    yield from columns([_HEAD, *map(_row, found.clients)])
    yield ""
    yield (
        f"{len(found.clients)} clients, {len(found.abandoned)} abandoned sessions; since the "
        f"reset {found.object_swaps} objects and {found.session_swaps} sessions were swapped out, "
        f"{found.refreshes} refreshed"
    )
    limits = (f"{most} {what.replace('_', ' ')}" for what, most in found.limits.items())
    yield shown(f"at most {', '.join(limits)}")


def _row(one: ClientInfo) -> tuple[str, ...]:
    return (
        str(one.number),
        one.channel + (f" {one.address}" if one.address else ""),
        "-" if one.pid is None else str(one.pid),
        "-" if one.uid is None else user_name(one.uid),
        *(duration(one.connected), duration(one.idle), str(one.commands)),
        *(_count(one.objects), _count(one.sessions)),
    )


def _count(held: Iterable[Held]) -> str:
    places = Counter(one.place == "loaded" for one in held)
    return f"{places.total()} ({places[False]})" if places[False] else str(places.total())


def _handles(found: ClientsInfo) -> Iterator[str]:
    for one in found.clients:
        for held in (*one.objects, *one.sessions):
            yield shown(f"{one.number} 0x{held.handle:08x} {held.kind} {held.place}")
    for held in found.abandoned:
        yield shown(f"- 0x{held.handle:08x} {held.kind} {held.place}")


_UNKNOWN: Final = frozenset({22, 25})  # EINVAL, ENOTTY: what a device says to an unknown ioctl
_ONE_OF_THEM: Final = (
    "is it the clients' own device, or another emulator's? Name the TPM's, as vtpm0"
)
_START_ONE: Final = "start it with --resource-manager, or --managed on sockets"
