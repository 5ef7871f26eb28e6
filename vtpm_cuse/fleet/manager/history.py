"""What has happened to each TPM since its manager has begun, the newest of it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from vtpm_cuse.fleet.base import Note

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vtpm_cuse.fleet.base import Tpm

_NOTES_MAX: Final = 50
"""For each TPM."""


class History:
    """Notes by a TPM's id. A sleep is none, nor that one wakes: these come by the thousand."""

    def __init__(self) -> None:
        self._notes: dict[str, list[Note]] = {}
        self._last: dict[str, str] = {}

    def note(self, number: str, text: str) -> None:
        """Something that was done with it."""
        notes = self._notes.setdefault(number, [])
        notes.append(Note(time.time(), text))
        del notes[:-_NOTES_MAX]

    def see(self, tpm: Tpm) -> None:
        """What it is now, which is noted where it is something else than it was."""
        state = _phase(tpm)
        if self._last.get(tpm.id, "stopped") != state:
            self._last[tpm.id] = state
            self.note(tpm.id, state)

    def forget(self, number: str) -> None:
        """It is no more."""
        self._notes.pop(number, None)
        self._last.pop(number, None)

    def of(self, number: str) -> Sequence[Note]:
        """The oldest first."""
        return tuple(self._notes.get(number, ()))


def _phase(tpm: Tpm) -> str:
    if tpm.state == "failed":
        return f"failed: {tpm.failure}"
    return "stopped" if tpm.state == "stopped" else "started"
