"""What a worker is told with the TPM that it gets."""

from __future__ import annotations

import json
from typing import Final, NamedTuple

MAKE: Final = 0
"""The TPM is made, and ends."""
ON: Final = 1
"""It is powered on, cold, and started up."""
OFF: Final = 2
"""It is off: only a client who may reset it brings it back."""
RESUME: Final = 3
"""It goes on from what was saved."""

WATCH_DATA: Final = 1
"""Flag of ASLEEP: a data client that comes is served at once; else it waits for the other's end."""


class Task(NamedTuple):
    """What comes with SERVE, whose flags are one of the four above.

    Attributes:
        idle: Seconds without a command after which it sleeps.
        profile: Of a TPM to be made.
        saved: What it goes on from.
        permanent: The permanent state, as a LOAD gives it; nothing where the worker has to ask.
    """

    idle: float
    profile: str | None = None
    saved: bytes = b""
    permanent: bytes = b""

    def pack(self) -> bytes:
        """As a body."""
        head = json.dumps([self.idle, self.profile, len(self.saved)]).encode()
        return head + b"\n" + self.saved + self.permanent

    @classmethod
    def unpack(cls, body: bytes) -> Task:
        """The reverse."""
        head, _, states = body.partition(b"\n")
        idle, profile, size = json.loads(head)
        return cls(idle, profile, states[:size], states[size:])
