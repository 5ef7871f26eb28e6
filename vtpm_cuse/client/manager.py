"""Talks to the manager of many TPMs, ``vtpmd``.

    with Manager() as manager:
        tpm = manager.create("web1")
        tpm = manager.start("web1")
        print(tpm.sockets["managed"])

Calls block. An object has one connection, on which calls follow each other: threads need one each.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from base64 import b64decode
from typing import TYPE_CHECKING, Final, NamedTuple, Self, TypeVar, get_args

from vtpm_cuse.client.connect import connect_unix
from vtpm_cuse.errors import FleetError, FleetFault, FrontendError, MessageError, VarlinkError
from vtpm_cuse.wire import manager, varlink
from vtpm_cuse.wire.manager import MANAGER, Archive, Event, Identity, Key, Note, Offer, Tpm
from vtpm_cuse.wire.varlink import BadParameter, Call, Messages, Reply, from_json, to_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

Answer = TypeVar("Answer")

VARIABLE: Final = "VTPM_MANAGER"
PATIENCE_SECONDS: Final = 600.0
"""For an answer: keys of a new TPM take their time, and other requests may come first."""
_NAME: Final = "manager.sock"
_SYSTEM: Final = "/run/vtpm"
_READ_SIZE: Final = 1 << 16


def default_path() -> str:
    """Where the manager is: as VTPM_MANAGER says, else the user's own if there is one, else root's.

    The variable of another user's session says nothing: its socket is not this user's. Nobody need
    answer there.
    """
    if found := os.environ.get(VARIABLE):
        return found
    own = os.path.join(os.environ.get("XDG_RUNTIME_DIR", ""), "vtpmd", _NAME)
    with contextlib.suppress(OSError):
        if os.path.isabs(own) and os.stat(own).st_uid == os.geteuid():
            return own
    return os.path.join(_SYSTEM, _NAME)


class Manager:
    """A connection to it.

    Args:
        path: Of its socket; by default `default_path`.
        patience: Seconds for an answer.

    Attributes:
        path: Of its socket.

    Raises:
        FrontendError: No manager answers.

    All methods raise:
        FleetError: It refuses; ``fault`` says why.
        VarlinkError: It does not know the method, or what is asked of it in this way.
        FrontendError: The connection has ended, or no answer comes.
    """

    def __init__(self, path: str | None = None, patience: float = PATIENCE_SECONDS) -> None:
        self.path = default_path() if path is None else path
        self._patience = patience
        self._messages = Messages(varlink.REPLY_MAX)
        try:
            self._socket = connect_unix(self.path)
        except OSError as exc:
            reason = f"No manager answers at {self.path} ({exc.strerror})"
            start = "vtpmd --user" if os.geteuid() else "vtpmd"
            raise FrontendError(reason, f"start one with '{start}'") from exc

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection; the TPMs stay."""
        self._socket.close()

    def create(
        self,
        name: str,
        *,
        owner: int | None = None,
        profile: str | None = None,
        labels: Mapping[str, str] | None = None,
        manufactured: bool = False,
        key: Key | None = None,
        interface: str | None = None,
        cdi: Offer | None = None,
    ) -> Tpm:
        """Makes a TPM, which is stopped.

        Args:
            name: What it is to be called.
            owner: Number of the user that it is for; for another one than oneself as root alone.
            profile: libtpms' JSON, or a name for it.
            labels: To be kept beside it.
            manufactured: It has endorsement keys, their certificates, and one of the platform.
            key: Where the manager finds the key that encrypts what is stored of it, or that key,
                which `start` needs again then.
            interface: How clients are to reach it: "socket", which is the default, "fuse" or "cuse".
            cdi: Containers may ask for it, and it is to "keep" or to "remove" when one ends that
                had it.
        """
        kept = None if labels is None else dict(labels)
        made = manufactured or None
        given = manager.Create(name, owner, profile, kept, made, key, interface, cdi)
        return self._tpm("Create", given)

    def start(self, name: str, *, key: Key | None = None) -> Tpm:
        """Serves it; the first command wakes it. *key* has the key that is kept nowhere, if it has one."""
        return self._tpm("Start", manager.Start(name, key))

    def stop(self, name: str) -> Tpm:
        """Shuts it down, and serves it no longer."""
        return self._tpm("Stop", manager.Named(name))

    def reset(self, name: str) -> Tpm:
        """Switches it off and on, as its platform would; a failed one is back then."""
        return self._tpm("Reset", manager.Named(name))

    def remove(self, name: str, *, force: bool = False) -> None:
        """Deletes it for good, with its state and its snapshots; with *force* in use, too."""
        self._ask("Remove", manager.Remove(name, force or None), varlink.Nothing)

    def list(self) -> list[Tpm]:
        """The caller's TPMs; all of them for root, and for the user that the manager runs as."""
        answers = self._ask_for_more("List", manager.Listed(), manager.OfTpms)
        return [answer.tpm for answer in answers if answer.tpm is not None]

    def describe(self, name: str) -> Tpm:
        """What it is now."""
        return self._tpm("Describe", manager.Named(name))

    def update(
        self,
        name: str,
        *,
        new_name: str | None = None,
        labels: Mapping[str, str] | None = None,
        cdi: Offer | None = None,
    ) -> Tpm:
        """Gives it another name, other labels in place of all that it has, or to containers."""
        given = manager.Update(name, new_name, None if labels is None else dict(labels), cdi)
        return self._tpm("Update", given)

    def snapshot(self, name: str, snapshot: str) -> None:
        """Keeps its state under a name."""
        self._ask("Snapshot", manager.Kept(name, snapshot), varlink.Nothing)

    def restore(self, name: str, snapshot: str) -> Tpm:
        """Gives it the state of a snapshot."""
        return self._tpm("Restore", manager.Kept(name, snapshot))

    def clone(self, name: str, new_name: str, *, identity: Identity = "new") -> Tpm:
        """Makes a TPM like it: by the same recipe, or with the "same" seeds and keys."""
        return self._tpm("Clone", manager.Clone(name, new_name, identity))

    def export(self, name: str) -> Archive:
        """A copy of a stopped TPM, with all its secrets; see `import_tpm`."""
        return self._ask("Export", manager.Named(name), manager.OfArchive).archive

    def import_tpm(
        self,
        archive: Archive,
        *,
        name: str | None = None,
        owner: int | None = None,
        key: Key | None = None,
        interface: str | None = None,
    ) -> Tpm:
        """Has the manager take a TPM that was exported, and is nowhere else now.

        Args:
            archive: What `export` gave.
            name: What it is to be called, by default as it was.
            owner: As for `create`.
            key: Where the key is that its state was encrypted with, or that key.
            interface: As for `create`.
        """
        given = manager.Import(
            archive.name if name is None else name, archive, owner, key, interface
        )
        return self._tpm("Import", given)

    def hibernate(self, name: str) -> Tpm:
        """Puts it to sleep before its time."""
        return self._tpm("Hibernate", manager.Named(name))

    def wake(self, name: str) -> Tpm:
        """Wakes it before its first command."""
        return self._tpm("Wake", manager.Named(name))

    def look(self, name: str, what: str) -> bytes | None:
        """What one that is awake says of itself, unnoticed by its clients.

        Args:
            name: Of the TPM, which is not woken for that: FleetError says Busy.
            what: As the kernel calls its files: "caps", "durations", "timeouts",
                "tpm_version_major", "pcr-sha256/10"; and "ek.crt", the certificate of its
                endorsement key in DER.

        Returns:
            What the file would have; None where the TPM has no such thing.
        """
        data = self._ask("Look", manager.Look(name, what), manager.OfLook).data
        try:
            return None if data is None else b64decode(data, validate=True)
        except ValueError as exc:
            raise FrontendError("The manager answers what is no base64") from exc

    def logs(self, name: str) -> Sequence[Note]:
        """What has happened to it since the manager has begun, the newest last."""
        return self._ask("Logs", manager.Named(name), manager.OfNotes).notes

    def watch(self) -> Iterator[Event]:
        """What happens to the caller's TPMs, from the return of this method on.

        The connection is used up by it. The iterator ends when the manager cannot go on, as with
        one who does not read.
        """
        answers = self._ask_for_more("Watch", varlink.Nothing(), manager.OfEvent, endless=True)
        next(answers, None)  # the first has no event in it
        return (answer.event for answer in answers if answer.event is not None)

    def _tpm(self, method: str, given: NamedTuple) -> Tpm:
        return self._ask(method, given, manager.OfTpm).tpm

    def _ask(self, method: str, given: NamedTuple, answer: Callable[..., Answer]) -> Answer:
        self._send(Call(f"{MANAGER.name}.{method}", to_json(given)))
        return _read(answer, self._receive())

    def _ask_for_more(
        self,
        method: str,
        given: NamedTuple,
        answer: Callable[..., Answer],
        *,
        endless: bool = False,
    ) -> Iterator[Answer]:
        self._send(Call(f"{MANAGER.name}.{method}", to_json(given), more=True))
        continues = True
        while continues:
            reply = self._receive()
            continues = reply.continues
            if endless:
                self._wait_for(0)
            yield _read(answer, reply)

    def _send(self, call: Call) -> None:
        self._wait_for(self._patience)
        # After a broken pipe, it may have said why before, which is there to be read.
        with self._lasting(), contextlib.suppress(BrokenPipeError):
            self._socket.sendall(varlink.encode_call(call))

    def _receive(self) -> Reply:
        """Raises FrontendError, FleetError, VarlinkError."""
        with self._lasting():
            while (message := self._messages.take()) is None:
                data = self._socket.recv(_READ_SIZE)
                if not data:
                    raise FrontendError(f"The manager at {self.path} has hung up")
                self._messages.feed(data)
            reply = varlink.decode_reply(message)
        if reply.error:
            raise _error(reply)
        return reply

    def _wait_for(self, seconds: float) -> None:
        """So long for each step from now on; 0 is for ever."""
        whole, part = divmod(seconds, 1)
        limit = struct.pack("@ll", int(whole), int(part * 1e6))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)

    @contextlib.contextmanager
    def _lasting(self) -> Iterator[None]:
        try:
            yield
        except BlockingIOError as exc:
            raise FrontendError(f"The manager at {self.path} does not answer") from exc
        except OSError as exc:
            raise FrontendError(f"The manager at {self.path} has gone: {exc.strerror}") from exc
        except MessageError as exc:
            raise FrontendError(f"No manager is at {self.path}: {exc}") from exc


# Any: JSON.
def _read(kind: Callable[..., Answer], reply: Reply) -> Answer:
    try:
        return from_json(kind, reply.parameters, strict=False)
    except BadParameter as exc:
        raise FrontendError(f"The manager answers what is none of its interface: {exc}") from exc


def _error(reply: Reply) -> FleetError | VarlinkError | FrontendError:
    interface, _, name = reply.error.rpartition(".")
    if interface == MANAGER.name:
        why = _read(manager.Why, reply)
        for fault in get_args(FleetFault):
            if name == fault:
                return FleetError(fault, why.tpm, why.reason)
        return FrontendError(why.reason)
    return VarlinkError(reply.error, reply.parameters)
