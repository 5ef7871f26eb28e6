"""Serves a fleet to its users, as varlink on a Unix socket.

Who asks is whom the kernel names (SO_PEERCRED, unix(7)). Root, and the user of this process,
manage all TPMs; another user sees and manages his own. Nobody waits for a client: one that sends
no end of a message, or reads no reply, is cut off, and each user has so many connections.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from base64 import b64decode, b64encode
from collections import Counter
from contextlib import aclosing
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, NamedTuple, get_args

import trio

from vtpm_cuse import __version__
from vtpm_cuse.acquire.peers import NO_UID, Credentials
from vtpm_cuse.config import KeySource, Secret
from vtpm_cuse.errors import FleetError, MessageError, VarlinkError, VtpmError
from vtpm_cuse.faults import sentence
from vtpm_cuse.fleet.base import Interface, Spec
from vtpm_cuse.fleet.states.archives import packed, unpacked_untrusted
from vtpm_cuse.wire import manager, varlink
from vtpm_cuse.wire.manager import MANAGER
from vtpm_cuse.wire.varlink import SERVICE, BadParameter, Messages, Reply, from_json, to_json

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence

    from vtpm_cuse.fleet.base import Fleet, Offer, Tpm
    from vtpm_cuse.wire.varlink import Call, Method

log = logging.getLogger(__name__)

CONNECTIONS_MAX: Final = 192
"""Of all users together; those who manage all TPMs are not counted, nor kept out by others."""
USER_CONNECTIONS_MAX: Final = 32
PATIENCE_SECONDS: Final = 10.0
"""For the rest of a message, and for a client to read."""

_READ_SIZE: Final = 16384
_WHAT_MAX: Final = 64
"""Characters of what is looked at."""
_TOGETHER: Final = 64
"""Of one call's replies; between them, others get their turn."""
_PAUSE_SECONDS: Final = 0.1
_NO_ROOM: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_ROOT: Final = 0
_NOBODY: Final = frozenset({65534, NO_UID})
"""Whom the kernel shows where it cannot tell, which may be several: such a one owns nothing."""
_INFO: Final = varlink.Info("vtpm-cuse", "vtpmd", __version__, "", [SERVICE.name, MANAGER.name])
_INTERFACES: Final = {interface.name: interface for interface in (SERVICE, MANAGER)}
_METHODS: Final[Mapping[str, Method]] = {
    f"{interface.name}.{method.name}": method
    for interface in _INTERFACES.values()
    for method in interface.methods
}
_WATCH: Final = f"{MANAGER.name}.Watch"


async def serve(fleet: Fleet, listener: trio.SocketListener) -> None:
    """Serves *fleet* to all who connect to *listener*, a Unix socket, until it is cancelled.

    Then *listener* is closed.
    """
    places = _Places()
    async with listener, trio.open_nursery() as nursery:
        while True:
            try:
                stream = await listener.accept()
            except OSError as exc:
                if exc.errno not in _NO_ROOM:
                    raise
                log.error("No client can be let in: %s", sentence(exc))
                await trio.sleep(_PAUSE_SECONDS)  # it waits in the kernel meanwhile
            else:
                nursery.start_soon(_welcome, fleet, places, stream)


async def _welcome(fleet: Fleet, places: _Places, stream: trio.SocketStream) -> None:
    """Serves a client to its end. No error leaves: it would end all the others."""
    async with stream:
        try:
            asker = _asker(stream)
            client = _Client(fleet, stream, asker)
            with places.taken_by(asker) as welcome:
                if welcome:
                    await client.serve()
                else:
                    reason = "this user has too many connections, or all have together"
                    await client.send(_refusal(FleetError("OverLimit", "", reason)))
        except* (trio.BrokenResourceError, trio.TooSlowError, MessageError) as group:
            log.debug("A client was cut off: %s", group.exceptions[0])


class _Asker(NamedTuple):
    """Who asks."""

    uid: int
    pid: int

    @property
    def manages_all(self) -> bool:
        return self.uid in {_ROOT, os.geteuid()}

    def manages(self, owner: int) -> bool:
        return self.manages_all or (self.uid == owner and self.uid not in _NOBODY)


def _asker(stream: trio.SocketStream) -> _Asker:
    pid, uid, _ = Credentials.of(stream.socket)
    return _Asker(uid, pid)


class _Places:
    """How many connections each user has."""

    def __init__(self) -> None:
        self._taken: Counter[int] = Counter()

    @contextlib.contextmanager
    def taken_by(self, asker: _Asker) -> Iterator[bool]:
        """Gives whether there is a place, which is held meanwhile."""
        counted = [(asker.uid, USER_CONNECTIONS_MAX)]
        if not asker.manages_all:
            counted.append((NO_UID, CONNECTIONS_MAX))
        welcome = all(self._taken[which] < most for which, most in counted)
        held = Counter([which for which, _ in counted] if welcome else [])
        self._taken += held
        try:
            yield welcome
        finally:
            self._taken -= held


class _Client:
    """A connection, whose calls are answered one after the other."""

    def __init__(self, fleet: Fleet, stream: trio.SocketStream, asker: _Asker) -> None:
        self._fleet, self._stream, self._asker = fleet, stream, asker
        self._messages = Messages(varlink.CALL_MAX)
        self._changes: dict[str, Callable[[str], Awaitable[Tpm]]] = {
            "Stop": fleet.stop,
            "Reset": fleet.reset,
            "Hibernate": fleet.hibernate,
            "Wake": fleet.wake,
        }

    async def serve(self) -> None:
        """Until the client ends it.

        Raises:
            MessageError: It does not speak varlink.
            trio.TooSlowError: It sends no end of a message, or does not read.
            trio.BrokenResourceError: It has gone.
        """
        while (message := await self._next()) is not None:
            call = varlink.decode_call(message)
            if call.method == _WATCH:
                await self._while_there(call)
                return
            await self._answer(call)
            await trio.lowlevel.checkpoint()  # for the others, where nothing had to be waited for

    async def send(self, *replies: Reply) -> None:
        """Raises trio.TooSlowError, trio.BrokenResourceError."""
        data = b"".join(map(varlink.encode_reply, replies))
        with trio.fail_after(PATIENCE_SECONDS):
            await self._stream.send_all(data)

    async def _next(self) -> bytes | None:
        """A message; None at the end. A client may be silent between two for as long as it likes."""
        if not self._messages and not await self._receive():
            return None
        with trio.fail_after(PATIENCE_SECONDS):
            while (message := self._messages.take()) is None:
                if not await self._receive():
                    return None
        return message

    async def _receive(self) -> bool:
        data = await self._stream.receive_some(_READ_SIZE)
        self._messages.feed(data)
        return bool(data)

    async def _while_there(self, call: Call) -> None:
        """Answers a call that has no end of its own: anything that the client does is the end."""
        async with trio.open_nursery() as nursery:

            async def end() -> None:
                with contextlib.suppress(trio.BrokenResourceError):
                    await self._stream.receive_some(1)
                nursery.cancel_scope.cancel()

            nursery.start_soon(end)
            await self._answer(call)
            nursery.cancel_scope.cancel()

    async def _answer(self, call: Call) -> None:
        async with aclosing(self._replies(call)) as replies:
            while True:
                try:
                    some = await anext(replies)
                except StopAsyncIteration:
                    return
                except Exception as exc:  # whatever it is, the other clients are served
                    some = (_refusal(exc),)
                if not call.oneway:
                    await self.send(*some)

    async def _replies(self, call: Call) -> AsyncGenerator[Sequence[Reply], None]:
        """What *call* is answered, unless this raises: then `_refusal` says it.

        Replies that are there together come together: to send each costs more than to make it.
        """
        method, given = _understood(call)
        if isinstance(given, manager.Listed):
            replies = await self._list(given)
            while some := tuple(islice(replies, _TOGETHER)):
                yield some
        elif call.method == _WATCH:
            async with aclosing(self._watch()) as events:
                async for reply in events:
                    yield (reply,)
        else:
            with trio.CancelScope(shield=True):  # what has been begun is done, in the end, too
                answer = await self._do(method.name, given)
            if method.name not in _TELLING:
                about = given[0]  # of all methods that change something, a name
                log.info("%s of %r, for user %d, process %d", method.name, about, *self._asker)
            yield (Reply(to_json(answer)),)

    async def _do(self, method: str, given: Any) -> NamedTuple:  # noqa: ANN401  # what it takes
        match method, given:
            case "GetInfo", _:
                return _INFO
            case "GetInterfaceDescription", varlink.Asked(name):
                return varlink.Described(_interface(name).description)
            case "Create", manager.Create():
                spec, secret = self._spec(given), _secret_of(given.key)
                return manager.OfTpm(as_told(await self._fleet.create(spec, secret)))
            case "Describe", manager.Named(name):
                return manager.OfTpm(as_told(await self._own(name)))
            case "Remove", manager.Remove(name, force):
                await self._fleet.remove((await self._own(name)).id, force=bool(force))
                return varlink.Nothing()
            case "Snapshot", manager.Kept(name, snapshot):
                await self._fleet.snapshot((await self._own(name)).id, snapshot)
                return varlink.Nothing()
            case "Import", manager.Import(name, archive, owner, place, interface):
                bundle = unpacked_untrusted(name, self._owner(name, owner), archive)
                source, kind = self._key(name, place), self._interface(name, interface)
                spec = bundle.spec._replace(key=source, interface=kind)
                bundle = bundle._replace(spec=spec)
                return manager.OfTpm(as_told(await self._fleet.take_in(bundle, _secret_of(place))))
            case "Logs", manager.Named(name):
                notes = await self._fleet.logs((await self._own(name)).id)
                return manager.OfNotes([manager.Note(*note) for note in notes])
            case "Look", manager.Look(name, what):
                if len(what) > _WHAT_MAX:
                    raise _bad_parameter("what")
                seen = await self._fleet.look((await self._own(name)).id, what)
                return manager.OfLook(None if seen is None else b64encode(seen).decode())
            case "Export", manager.Named(name):
                exported = await self._fleet.export((await self._own(name)).id)
                return manager.OfArchive(packed(exported))
        found = await self._own(given.name)
        key = found.id
        match given:
            case manager.Start(name, place):
                if place is not None and place.secret is None:
                    raise _bad_parameter("key")
                self._key(name, place)
                tpm = await self._fleet.start(key, _secret_of(place))
            case manager.Update(_, new_name, labels, cdi):
                pairs = None if labels is None else tuple(labels.items())
                offer = cdi and self._offer(given.name, cdi)
                tpm = await self._fleet.update(key, new_name, pairs, offer)
            case manager.Kept(_, snapshot):
                tpm = await self._fleet.restore(key, snapshot)
            case manager.Clone(name, new_name, identity):
                self._interface(name, found.interface)
                tpm = await self._fleet.clone(key, new_name, identity or "new")
            case _:
                tpm = await self._changes[method](key)
        return manager.OfTpm(as_told(tpm))

    async def _own(self, name: str) -> Tpm:
        """One that the client manages.

        What is then done to it is done by its id: this name may be another's by then.

        Raises:
            FleetError: There is none, or it is another user's.
        """
        tpm = await self._fleet.describe(name)
        if not self._asker.manages(tpm.owner):
            raise FleetError("NotOwner", name, "it belongs to another user")
        return tpm

    def _owner(self, name: str, given: int | None) -> int:
        """Whom one is for. Raises FleetError, VarlinkError."""
        owner = self._asker.uid if given is None else given
        if not self._asker.manages(owner):
            raise FleetError("NotOwner", name, "for another user, only root makes a TPM")
        if not 0 <= owner < NO_UID:
            raise _bad_parameter("owner")
        return owner

    def _spec(self, given: manager.Create) -> Spec:
        owner = self._owner(given.name, given.owner)
        labels = tuple((given.labels or {}).items())
        key = self._key(given.name, given.key)
        interface = self._interface(given.name, given.interface)
        made = bool(given.manufactured)
        offer = self._offer(given.name, given.cdi or "off")
        return Spec(given.name, owner, given.profile, made, labels, key, interface, offer)

    def _offer(self, name: str, given: Offer) -> Offer:
        """Raises FleetError for those who could have a container of somebody else's find it."""
        if given != "off" and not self._asker.manages_all:
            reason = "only root, and the user of the manager, can offer it to containers"
            raise FleetError("NotOwner", name, reason)
        return given

    def _interface(self, name: str, given: str | None) -> Interface:
        """Raises FleetError, VarlinkError."""
        interface = _interface_of(given)
        if interface == "vtpm-proxy" and not self._asker.manages_all:  # all of the host sees it
            raise FleetError("NotOwner", name, "a TPM of the kernel's is made for a user by root")
        return interface

    def _key(self, name: str, given: manager.Key | None) -> KeySource | None:
        """Raises FleetError for those who could not read it, and VarlinkError."""
        if given is None:
            return None
        places = (given.file, given.pwdfile, given.credential)
        if given.secret is not None:
            if places.count(None) != len(places):
                raise _bad_parameter("key")
            return KeySource() if given.mode is None else KeySource(mode=given.mode)
        if not self._asker.manages_all:  # the manager reads it, and it would tell them of files
            reason = "only root, and the user of the manager, can say where a key is"
            raise FleetError("NotOwner", name, reason)
        paths = [path for path in (given.file, given.pwdfile) if path is not None]
        if len([*paths, *filter(None, [given.credential])]) != 1:
            raise _bad_parameter("key")
        if not all(map(os.path.isabs, paths)):
            raise _bad_parameter("key.file" if given.file else "key.pwdfile")
        found = {field: text for field, text in given._asdict().items() if text is not None}
        return KeySource(**found)

    async def _list(self, given: manager.Listed) -> Iterator[Reply]:
        if given.name is not None:
            found = [await self._own(given.name)]
        else:
            found = [tpm for tpm in await self._fleet.list() if self._asker.manages(tpm.owner)]
        last = len(found) - 1
        if not found:
            return iter([Reply({})])
        return (
            Reply(to_json(manager.OfTpms(as_told(tpm))), continues=number < last)
            for number, tpm in enumerate(found)
        )

    async def _watch(self) -> AsyncGenerator[Reply, None]:
        async with self._fleet.watch() as events:
            yield Reply({}, continues=True)
            async for event in events:
                if self._asker.manages(event.tpm.owner):
                    told = manager.Event(event.kind, as_told(event.tpm))
                    yield Reply(to_json(manager.OfEvent(told)), continues=True)
        yield Reply({})


_TELLING: Final = frozenset({"GetInfo", "GetInterfaceDescription", "Describe", "Logs", "Look"})


def _secret_of(given: manager.Key | None) -> Secret | None:
    """Raises VarlinkError."""
    if given is None or given.secret is None:
        return None
    try:
        return Secret(b64decode(given.secret, validate=True))
    except ValueError as exc:
        raise _bad_parameter("key.secret") from exc


def _interface_of(given: str | None) -> Interface:
    """Raises VarlinkError."""
    for interface in get_args(Interface):
        if given in (None, interface):  # the first is the default
            found: Interface = interface
            return found
    raise _bad_parameter("interface")


def _understood(call: Call) -> tuple[Method, NamedTuple]:
    """Which method is meant, and its parameters. Raises VarlinkError."""
    _interface(call.method.rpartition(".")[0])
    if (method := _METHODS.get(call.method)) is None:
        raise _error("MethodNotFound", varlink.OfMethod(call.method))
    if call.upgrade:
        raise _error("MethodNotImplemented", varlink.OfMethod(call.method))
    try:
        given: NamedTuple = from_json(method.given, call.parameters)
    except BadParameter as exc:
        raise _bad_parameter(exc.name) from exc
    one = isinstance(given, manager.Listed) and given.name is not None
    if method.more and not (call.more or one):
        raise _error("ExpectedMore", varlink.Nothing())
    return method, given


def _interface(name: str) -> varlink.Interface:
    try:
        return _INTERFACES[name]
    except KeyError:
        raise _error("InterfaceNotFound", varlink.OfInterface(name)) from None


def _bad_parameter(name: str) -> VarlinkError:
    return _error("InvalidParameter", varlink.OfParameter(name))


def _error(name: str, parameters: NamedTuple) -> VarlinkError:
    return VarlinkError(f"{SERVICE.name}.{name}", to_json(parameters))


def _refusal(exc: Exception) -> Reply:
    """The reply that an error is."""
    name: str
    match exc:
        case VarlinkError():
            return Reply(exc.parameters, error=exc.name)
        case FleetError():
            name, why = exc.fault, manager.Why(exc.tpm, exc.reason)
        case VtpmError() | OSError() | MemoryError():
            name, why = "Failed", manager.Why("", sentence(exc))
            log.error("%s", sentence(exc))
        case _:
            log.error("The manager has a fault: %r", exc)
            log.debug("It was here", exc_info=exc)
            name, why = "Failed", manager.Why("", "the manager has a fault; its log says which")
    return Reply(to_json(why), error=f"{MANAGER.name}.{name}")


def as_told(tpm: Tpm) -> manager.Tpm:
    """As the wire has it."""
    return manager.Tpm(
        tpm.name,
        tpm.id,
        tpm.owner,
        tpm.state,
        tpm.interface,
        {str(kind): path for kind, path in tpm.sockets.items()},
        tpm.generation,
        {
            "commands": tpm.commands,
            "wakes": tpm.wakes,
            "sleeps": tpm.sleeps,
            "failures": tpm.failures,
        },
        dict(tpm.labels),
        tpm.failure,
        tpm.encrypted,
        tpm.last_used,
        tpm.pid,
        tpm.device,
        tpm.managed_device,
        tpm.cdi,
    )
