"""What a worker is told with the TPM that it gets."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from vtpm_cuse.fleet.base import Interface

MAKE: Final = 0
"""The TPM is made, powered on and started up, and ends; what STOPPED brings is for ON."""
ON: Final = 1
"""It is powered on, cold, and started up; or goes on from there, where what is saved is of a MAKE."""
OFF: Final = 2
"""It is off: only a client who may reset it brings it back."""
RESUME: Final = 3
"""It goes on from what was saved."""

FUSE_FILES: Final = ("vtpm0", "vtpmrm0")
"""Those of a TPM that is a mount: the device for one client, and that for many."""
IN_ORDER: Final = b"in order"
"""With SLEEP: as if it were shut down, for it may never go on."""
WATCH_DATA: Final = 1
"""Flag of ASLEEP: a data client that comes is served at once; else it waits for the other's end."""


class Task(NamedTuple):
    """What comes with SERVE, whose flags are one of the four above.

    Attributes:
        idle: Seconds without a command after which it sleeps.
        profile: Of a TPM to be made.
        saved: What it goes on from.
        permanent: The permanent state, as a LOAD gives it; nothing where the worker has to ask.
        interface: How its clients come: what descriptors there are.
        owner: The user whose it is.
        generation: No process has had it with this number, or with a higher one.
    """

    idle: float
    profile: str | None = None
    saved: bytes = b""
    permanent: bytes = b""
    interface: Interface = "socket"
    owner: int = 0
    generation: int = 0

    def pack(self) -> bytes:
        """As a body."""
        numbers = (self.interface, self.owner, self.generation)
        head = json.dumps([self.idle, self.profile, len(self.saved), *numbers]).encode()
        return head + b"\n" + self.saved + self.permanent

    @classmethod
    def unpack(cls, body: bytes) -> Task:
        """The reverse."""
        head, _, states = body.partition(b"\n")
        idle, profile, size, *rest = json.loads(head)
        return cls(idle, profile, states[:size], states[size:], *rest)
