"""How TPMs of the manager's are shown to people: a row each."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from vtpm_cuse.cli.words.columns import columns, duration, user_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vtpm_cuse.wire.manager import Tpm

_HEAD: Final = ("NAME", "STATE", "OWNER", "PID", "COMMANDS", "WAKES", "USED")


def table(tpms: Sequence[Tpm], rates: Sequence[str] = ()) -> Iterator[str]:
    """Lines: a heading, and each of *tpms*, with what *rates* has for it."""
    head = (*_HEAD, "PER SECOND") if rates else _HEAD
    rows = [(*_row(tpm), *rates[at : at + 1]) for at, tpm in enumerate(tpms)]
    return columns([head, *rows])


def when(seconds: float | None) -> str:
    """How long ago it was, of seconds since 1970."""
    if seconds is None:
        return "never"
    return f"{duration(int(time.time() - seconds))} ago"


def _row(tpm: Tpm) -> tuple[str, ...]:
    return (
        tpm.name,
        tpm.state,
        user_name(tpm.owner),
        "-" if tpm.pid is None else str(tpm.pid),
        *(str(tpm.counters.get(name, 0)) for name in ("commands", "wakes")),
        when(tpm.last_used),
    )
