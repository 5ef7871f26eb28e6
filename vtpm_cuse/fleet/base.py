"""What a fleet of TPMs is to who asks for it: the words of the manager and of its interface."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    from vtpm_cuse.config import KeySource, Secret

State = Literal["stopped", "asleep", "awake", "starting", "failed"]
"""Off; on, without a process; on, in a process of its own; on the way there; lost until a reset."""
SocketKind = Literal["data", "control", "managed"]
Interface = Literal["socket", "fuse", "cuse", "vtpm-proxy"]
"""How clients reach a TPM: by three Unix sockets, two files in a mount, two character devices, or as a
TPM of the kernel's, which is two devices, too."""
Offer = Literal["off", "keep", "remove"]
"""To containers: not at all, or what becomes of a TPM when the container ends that had it."""
Identity = Literal["new", "same"]
"""Of a clone: a TPM of its own, made by the same recipe, or the same seeds and keys once more."""


class Spec(NamedTuple):
    """A TPM to be made: ``owner`` is a uid, ``profile`` libtpms' JSON or a name for it.

    ``key`` is where the key is kept that encrypts its state; it is read there at every start. One that is
    kept nowhere comes beside it, and again at every start.
    """

    name: str
    owner: int
    profile: str | None = None
    manufactured: bool = False
    labels: tuple[tuple[str, str], ...] = ()
    key: KeySource | None = None
    interface: Interface = "socket"
    cdi: Offer = "off"


class Bundle(NamedTuple):
    """A TPM outside of a manager: ``state`` is its permanent state, as it is in a file, secret."""

    id: str
    spec: Spec
    state: bytes


class Tpm(NamedTuple):
    """One TPM as it is now.

    ``id`` is a UUID and never changes; ``sockets`` are absolute paths, none of one that is a
    device: ``device`` is its path for one client, ``managed_device`` that for many, and of one of the kernel's
    there is none while it is off, for its number may be another one then; ``generation`` counts its
    sleeps and power-ups; ``last_used`` is seconds since 1970, None before the first use;
    ``commands``, ``wakes``, ``sleeps`` and ``failures`` count since the manager began; ``pid`` is
    that of its process while it has one; ``failure`` says what happened to one that is failed, and
    is empty otherwise; what is stored of one that is ``encrypted`` needs its key.
    """

    name: str
    id: str
    owner: int
    state: State
    interface: Interface
    sockets: Mapping[SocketKind, str]
    generation: int
    last_used: float | None
    commands: int
    wakes: int
    pid: int | None
    failure: str
    labels: tuple[tuple[str, str], ...] = ()
    encrypted: bool = False
    sleeps: int = 0
    failures: int = 0
    device: str | None = None
    managed_device: str | None = None
    cdi: Offer = "off"


class Note(NamedTuple):
    """Something that was done with a TPM, or that has happened to it, in seconds since 1970."""

    time: float
    text: str


class Event(NamedTuple):
    """Something happened to a TPM, which is ``tpm`` afterwards, or was before it was removed."""

    kind: Literal["created", "changed", "removed"]
    tpm: Tpm


class Fleet(Protocol):
    """All TPMs of one manager, each under one name; all methods raise FleetError.

    Who may ask for what is the business of who serves it to others. One request at a time changes
    a TPM: another one waits. A TPM that is there is named by its name or by its id, which nothing
    else is ever called: who has looked at a TPM can be sure to change that one.
    """

    async def create(self, spec: Spec, secret: Secret | None = None) -> Tpm:
        """Make a TPM, stopped. OverLimit, TpmExists, BadName, KeyRejected."""

    async def start(self, name: str, secret: Secret | None = None) -> Tpm:
        """Power it on, cold. Busy unless stopped; StateDamaged, KeyRejected."""

    async def stop(self, name: str) -> Tpm:
        """Shut it down in order and switch it off; clients are disconnected."""

    async def reset(self, name: str) -> Tpm:
        """Power it off and on, as the platform's reset does: what brings back a failed one."""

    async def remove(self, name: str, *, force: bool = False) -> None:
        """Delete it with its state and snapshots. Busy unless it is stopped, or with *force*."""

    async def list(self, names: Sequence[str] | None = None) -> Sequence[Tpm]:
        """Those of *names*, or all, by name. NoSuchTpm."""

    async def describe(self, name: str) -> Tpm:
        """That one."""

    async def update(
        self,
        name: str,
        new_name: str | None = None,
        labels: tuple[tuple[str, str], ...] | None = None,
        cdi: Offer | None = None,
    ) -> Tpm:
        """Rename it (Busy unless stopped), replace its labels, offer it; None leaves each."""

    async def snapshot(self, name: str, snapshot: str) -> None:
        """Keep a copy of its permanent state. Busy unless stopped; TpmExists for the copy's name."""

    async def restore(self, name: str, snapshot: str) -> Tpm:
        """Go back to a copy. Busy unless stopped; NoSuchTpm where there is none."""

    async def clone(self, name: str, new_name: str, identity: Identity = "new") -> Tpm:
        """Make another by the same recipe; ``same`` seeds are for a stopped one only."""

    async def export(self, name: str) -> Bundle:
        """Give a copy of it. Busy unless stopped."""

    async def take_in(self, bundle: Bundle, secret: Secret | None = None) -> Tpm:
        """Have that TPM, stopped. As `create`; TpmExists also for its id, StateDamaged."""

    async def hibernate(self, name: str) -> Tpm:
        """Put it to sleep now. Busy while a client is in the middle of something."""

    async def wake(self, name: str) -> Tpm:
        """Give it a process now. Busy if it is off."""

    async def look(self, name: str, what: str) -> bytes | None:
        """What one that is awake says of itself, such as "pcr-sha256/10"; None if that is nothing.

        Busy if it is not awake, for nobody is woken by it, or a client is in the middle of something.
        """

    async def logs(self, name: str) -> Sequence[Note]:
        """What has happened to it since the manager has begun, the newest last."""

    def watch(self) -> AbstractAsyncContextManager[AsyncIterator[Event]]:
        """What happens from this call on; it ends for who takes it too slowly."""
