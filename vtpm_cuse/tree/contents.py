"""What is in the folder of a TPM: names, and the texts of what its manager knows. Pure.

All else is asked of the TPM while it is awake, and has the names and the form that the kernel's files
have under /sys/class/tpm.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from vtpm_cuse.errors import shown
from vtpm_cuse.wire import metrics
from vtpm_cuse.wire.varlink import to_json

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vtpm_cuse.wire.manager import Note, Tpm

ASKED: Final = ("caps", "durations", "ek.crt", "timeouts", "tpm_version_major")
LOG: Final = "log"

_BANKS: Final = ("pcr-sha1", "pcr-sha256", "pcr-sha384", "pcr-sha512")
"""Of libtpms; which of them a TPM uses is not known while it sleeps."""
_PCRS: Final = tuple(str(index) for index in range(24))


def _line(text: str) -> str:
    """One line, whatever somebody else has written into it."""
    return shown(text).replace("\n", "\\u000a")


def _lines(pairs: dict[str, str], between: str) -> str:
    return "\n".join(_line(f"{key}{between}{value}") for key, value in pairs.items())


_KNOWN: Final[dict[str, Callable[[Tpm], str | None]]] = {
    "device": lambda tpm: tpm.device,
    "failure": lambda tpm: _line(tpm.failure),
    "generation": lambda tpm: str(tpm.generation),
    "id": lambda tpm: tpm.id,
    "interface": lambda tpm: tpm.interface,
    "labels": lambda tpm: _lines(tpm.labels, "="),
    "managed_device": lambda tpm: tpm.managed_device,
    "metrics": lambda tpm: metrics.text([tpm]).rstrip("\n"),
    "owner": lambda tpm: str(tpm.owner),
    "sockets": lambda tpm: _lines(tpm.sockets, " "),
    "state": lambda tpm: tpm.state,
    "status": lambda tpm: json.dumps(to_json(tpm)),
}
"""Makers of texts; None for a file that this TPM has not."""


def folders(folder: str) -> Sequence[str]:
    """Names of the folders in one, by its path in a TPM's folder, which is ""."""
    return () if folder else _BANKS


def files(tpm: Tpm, folder: str) -> Sequence[str]:
    """Names of the files there."""
    if folder:
        return _PCRS
    known = (name for name, make in _KNOWN.items() if make(tpm) is not None)
    return sorted((*known, *ASKED, LOG))


def known(tpm: Tpm, path: str) -> bytes | None:
    """The text of a file that the manager knows, by its path; None where the TPM has to be asked."""
    make = _KNOWN.get(path)
    text = None if make is None else make(tpm)
    if text is None:
        return None
    return f"{text}\n".encode() if text else b""


def log_text(notes: Sequence[Note]) -> bytes:
    """What has happened, a line each."""
    return "".join(f"{_when(note.time)} {_line(note.text)}\n" for note in notes).encode()


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%FT%TZ")
