"""The interface of the manager of many TPMs, org.vtpmcuse.Manager, declared once."""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

from vtpm_cuse.wire.varlink import Failure, Interface, Method, Nothing

State = Literal["stopped", "asleep", "awake", "starting", "failed"]
Identity = Literal["new", "same"]
Offer = Literal["off", "keep", "remove"]
Happened = Literal["created", "changed", "removed"]


class Tpm(NamedTuple):
    """A TPM of the manager's.

    Attributes:
        name: What it is called, which can change.
        id: A UUID that no other TPM has had.
        owner: Number of the user it belongs to.
        state: What it does.
        interface: How clients reach it: "socket", "fuse", "cuse" or "vtpm-proxy".
        sockets: Absolute paths of the Unix sockets "data", "control" and "managed", if it has them.
        generation: Rises whenever it is given to another process.
        counters: "commands" it was given, "wakes", "sleeps" and "failures".
        labels: What its owner has written beside it.
        failure: Why it has failed; else empty.
        encrypted: Whether what is stored of it is.
        last_used: Of its last command, in seconds since 1970.
        pid: The process that serves it, while it is awake.
        device: If it is one, the absolute path of the device for one client; of "vtpm-proxy" only
            while it is on, for the kernel gives it a number each time.
        managed_device: The same for many clients, each of which sees a TPM of its own.
        cdi: Whether containers may ask for it, and if so, whether it is kept or removed when that
            ends which had it.
    """

    name: str
    id: str
    owner: int
    state: State
    interface: str
    sockets: dict[str, str]
    generation: int
    counters: dict[str, int]
    labels: dict[str, str]
    failure: str
    encrypted: bool
    last_used: float | None = None
    pid: int | None = None
    device: str | None = None
    managed_device: str | None = None
    cdi: Offer | None = None


class Archive(NamedTuple):
    """A TPM outside of a manager, with all its secrets.

    Attributes:
        format: "vtpm-cuse TPM".
        version: 1.
        id: Its UUID.
        name: What it was called.
        manufactured: As it was made.
        labels: What its owner has written beside it.
        permall: Its permanent state: the C suite's file tpm2-00.permall, in base64.
        profile: As it was made.
    """

    format: str
    version: int
    id: str
    name: str
    manufactured: bool
    labels: dict[str, str]
    permall: str
    profile: str | None = None


class Note(NamedTuple):
    """What has happened to a TPM, and when, in seconds since 1970."""

    time: float
    text: str


class Event(NamedTuple):
    """What has happened to a TPM, and what it is now, or was last."""

    kind: Happened
    tpm: Tpm


class Key(NamedTuple):
    """Where the manager reads a key, whenever it needs it: a file, a passphrase's, a credential.

    Or the key itself, which the manager has only while the TPM is on: it is needed at each start.

    Attributes:
        file: Absolute path of a file with the key.
        pwdfile: Absolute path of a file with a passphrase.
        credential: Name of a file in the manager's credentials directory, with the key.
        mode: The cipher, by default "aes-128-cbc".
        format: Of the key, "hex" by default, or "binary".
        kdf: For a passphrase, "pbkdf2" by default, or "sha512".
        secret: The key, as many bytes as its cipher takes, in base64.
    """

    file: str | None = None
    pwdfile: str | None = None
    credential: str | None = None
    mode: str | None = None
    format: str | None = None
    kdf: str | None = None
    secret: str | None = None


class Create(NamedTuple):
    """A TPM that is to be: for its owner, by default who asks; "socket" is the default interface."""

    name: str
    owner: int | None = None
    profile: str | None = None
    labels: dict[str, str] | None = None
    manufactured: bool | None = None
    key: Key | None = None
    interface: str | None = None
    cdi: Offer | None = None


class Named(NamedTuple):
    """Which TPM, by its name or its id."""

    name: str


class Start(NamedTuple):
    """Which TPM, by its name or its id, and its key, if that is given at each start."""

    name: str
    key: Key | None = None


class Remove(NamedTuple):
    """Which TPM has to go, even if it is in use."""

    name: str
    force: bool | None = None


class Listed(NamedTuple):
    """Which TPM, by default all."""

    name: str | None = None


class Update(NamedTuple):
    """What is to become of a TPM's name, of its labels, all of them, and of its offer."""

    name: str
    new_name: str | None = None
    labels: dict[str, str] | None = None
    cdi: Offer | None = None


class Kept(NamedTuple):
    """A TPM, and the name of a snapshot of it."""

    name: str
    snapshot: str


class Clone(NamedTuple):
    """A TPM like another: by the same recipe, or with the same seeds."""

    name: str
    new_name: str
    identity: Identity | None = None


class Import(NamedTuple):
    """What a TPM is to be called that was exported, and as for one that is to be."""

    name: str
    archive: Archive
    owner: int | None = None
    key: Key | None = None
    interface: str | None = None


class Look(NamedTuple):
    """Which TPM, and what of it: "caps", "ek.crt", "pcr-sha256/10", as the kernel calls its files."""

    name: str
    what: str


class OfLook(NamedTuple):
    """What that file would have, in base64; nothing where the TPM has no such thing."""

    data: str | None = None


class OfArchive(NamedTuple):
    """A TPM for another place."""

    archive: Archive


class OfNotes(NamedTuple):
    """What has happened, the newest last."""

    notes: list[Note]


class OfTpm(NamedTuple):
    """A TPM, as it is now."""

    tpm: Tpm


class OfTpms(NamedTuple):
    """The next of the TPMs; nothing where there is none."""

    tpm: Tpm | None = None


class OfEvent(NamedTuple):
    """The next event; nothing in the first reply, from which on none is missed."""

    event: Event | None = None


class Why(NamedTuple):
    """Which TPM it is about, and the reason, half a sentence."""

    tpm: str
    reason: str


MANAGER: Final = Interface(
    "org.vtpmcuse.Manager",
    "Many virtual TPMs of one host.",
    (Tpm, Event, Key, Archive, Note),
    (
        Method("Create", Create, OfTpm, "Makes a TPM, which is stopped."),
        Method("Start", Start, OfTpm, "Serves it; the first command wakes it."),
        Method("Stop", Named, OfTpm, "Shuts it down, and serves it no longer."),
        Method("Reset", Named, OfTpm, "Switches it off and on, as its platform would."),
        Method("Remove", Remove, Nothing, "Deletes it with its state and its snapshots."),
        Method("List", Listed, OfTpms, "The caller's TPMs, a reply for each.", more=True),
        Method("Describe", Named, OfTpm, "What it is now."),
        Method("Update", Update, OfTpm, "Gives it another name, other labels, or to containers."),
        Method("Snapshot", Kept, Nothing, "Keeps its state under a name."),
        Method("Restore", Kept, OfTpm, "Gives it the state of a snapshot."),
        Method("Clone", Clone, OfTpm, "Makes a TPM like it."),
        Method("Export", Named, OfArchive, "A copy of it, for another manager."),
        Method("Import", Import, OfTpm, "Has a TPM that was exported, which is stopped."),
        Method("Hibernate", Named, OfTpm, "Puts it to sleep before its time."),
        Method("Wake", Named, OfTpm, "Wakes it before its first command."),
        Method("Look", Look, OfLook, "What it says of itself while it is awake; it is not woken."),
        Method("Logs", Named, OfNotes, "What has happened to it since the manager has begun."),
        Method("Watch", Nothing, OfEvent, "What happens to the caller's TPMs.", more=True),
    ),
    (
        Failure("NoSuchTpm", Why, "There is no TPM, or no snapshot, of this name."),
        Failure("TpmExists", Why, "There is one of this name already."),
        Failure("Busy", Why, "It is in a state in which this cannot be done."),
        Failure("NotOwner", Why, "It belongs to another user."),
        Failure("StateDamaged", Why, "What is stored of it is damaged."),
        Failure("KeyRejected", Why, "Its key cannot be had, or is not the one that it needs."),
        Failure("OverLimit", Why, "There are too many already, or it is too large."),
        Failure("BadName", Why, "No TPM and no snapshot can be called so."),
        Failure("Failed", Why, "This host does not let the manager do it."),
    ),
)
