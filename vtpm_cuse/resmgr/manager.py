"""Connections to one TPM 2.0, each of which sees a TPM of its own.

Every handle that a client sends is translated or refused, none is passed on unknown; every answer
that is made up here is one that a TPM could give. Nothing is saved before somebody needs the room:
a client that stays within the TPM's limits costs no inner command.
"""

from __future__ import annotations

import contextlib
import itertools
import struct
from typing import TYPE_CHECKING, Final

from vtpm_cuse.errors import TpmError, WireError
from vtpm_cuse.resmgr import quota
from vtpm_cuse.resmgr.capability import capability
from vtpm_cuse.resmgr.commands import commands
from vtpm_cuse.resmgr.inner import Inner
from vtpm_cuse.resmgr.objects import NO_ROOM, Object, Objects
from vtpm_cuse.resmgr.quota import Limits
from vtpm_cuse.resmgr.refusal import LAYER, Dead, Refusal
from vtpm_cuse.resmgr.saved import Left, SavedConnection, SavedManager
from vtpm_cuse.resmgr.sessions import Place, Session, Sessions, digest_of
from vtpm_cuse.resmgr.used import Used
from vtpm_cuse.wire import tpm2_handles as wire
from vtpm_cuse.wire.tpm import (
    TPM_HEADER_SIZE,
    TpmCc,
    TpmRc,
    command_code,
    command_size,
    response_code,
    succeeded,
)
from vtpm_cuse.wire.tpm2_handles import SESSIONS, Context, TpmHt, kind_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from vtpm_cuse.engine.base import Tpm
    from vtpm_cuse.wire.tpm2_handles import CommandAttributes

_FIRST_OBJECT: Final = 0x8000_0000
_LAST_OBJECT: Final = 0x80FF_FFFE  # tpm2-tss takes 80FFFFFF for none
_VENDOR: Final = 0x2000_0000
_NO_SESSIONS: Final = b"\x80\x01"
_TAGS: Final = frozenset({_NO_SESSIONS, b"\x80\x02"})
_ONE_HANDLE_END: Final = TPM_HEADER_SIZE + 4
_SIZE_AND_HANDLE: Final = struct.Struct(">2xI4xI")
_FLUSH: Final = TpmCc.TPM_CC_FlushContext.to_bytes(4, "big")


class Manager:
    """Manages *tpm*; one call at a time, `Connection.cancel` alone beside a running command.

    Args:
        tpm: The TPM.
        inner: Gives it a command of the manager's, where that is another way than *tpm*'s.
        limits: What a client may have.

    Attributes:
        connections: Those that are not closed, by their numbers.
        sessions_max: Active sessions that the TPM has.
        alone: Nobody else uses the TPM: what was left in it is flushed before the first command.
    """

    def __init__(
        self,
        tpm: Tpm,
        *,
        inner: Callable[[bytes], bytes] | None = None,
        limits: Limits | None = None,
        alone: bool = True,
    ) -> None:
        self.tpm = tpm
        self.limits = limits or Limits()
        self._inner = Inner(inner or tpm.process)
        self.alone = alone
        self._known = self._ready = self._resumed = False
        self._left = Left()
        self._commands = commands(b"")
        self.sessions_max = 0
        self._numbers = itertools.count(1)
        self.connections: dict[int, Connection] = {}
        self._clock = itertools.count(1)
        self.objects = Objects(self._inner, 0)
        self.sessions = Sessions(self._inner, 0, 0)

    def connect(self, user: int | None = None) -> Connection:
        """A new client, of a *user* if there is one. This may be called beside a running command."""
        found = Connection(self, next(self._numbers), user)
        self.connections[found.number] = found
        return found

    @property
    def inner_commands(self) -> int:
        """How many commands the manager itself has given the TPM."""
        return self._inner.count

    def reset(self, *, resumed: bool = False) -> None:
        """The TPM has lost power, or has another state: what clients had loaded is no more.

        Sessions that they have saved are there as long as the TPM has them; if it goes on from
        where another left off (*resumed*), those that were saved there, for who has their contexts.
        """
        self._known = self._ready = False
        self._resumed = resumed
        for connection in list(self.connections.values()):
            connection.objects.clear()
        self.objects = Objects(self._inner, 0)
        if resumed:
            self.sessions = Sessions(self._inner, 0, 0)
        else:
            self.sessions.lose_power()

    def drop(self) -> None:
        """Ends what clients have, but not the clients: the TPM's state is about to leave.

        Nobody could use it there, but sessions by the contexts that clients have of them.
        """
        for connection in list(self.connections.values()):
            self.end_objects(connection)
        self.sessions.drop_useless()

    def note_given(self, answer: bytes) -> None:
        """An answer that gives any client a handle: whoever had it has lost it without a word.

        One that is not the manager's may have ended what had it. To be called before `process` goes
        on behind one of its own.
        """
        handle = wire.response_handle(answer) if succeeded(answer) else None
        if handle is None:
            return
        if kind_of(handle) == TpmHt.TRANSIENT:
            self.objects.lose_number(handle)
        elif kind_of(handle) in SESSIONS and (found := self.sessions.find(handle)) is not None:
            self.sessions.remove(found)

    def learn(self) -> bool:
        """Asks the TPM what it is like; False while it is not started.

        To be called as soon as it is: these questions end an exclusive audit session.
        """
        if self._known:
            return True
        inner = self._inner
        try:
            self._commands = commands(inner.commands())
            slots = inner.tpm_property(wire.TPM_PT_HR_TRANSIENT_MIN) or 1
            loaded = inner.tpm_property(wire.TPM_PT_HR_LOADED_MIN) or 1
            gap = inner.tpm_property(wire.TPM_PT_CONTEXT_GAP_MAX) or 0xFF
            self.sessions_max = inner.tpm_property(wire.TPM_PT_ACTIVE_SESSIONS_MAX) or loaded
            kinds = TpmHt.TRANSIENT, TpmHt.HMAC_SESSION, TpmHt.POLICY_SESSION
            self._left = Left(*(tuple(inner.handles(kind << 24)) for kind in kinds))
        except TpmError:
            return False
        self.objects = Objects(inner, slots)
        self.sessions.start(loaded, gap, self._left.saved)
        self.sessions.bound(self.limits.abandoned)
        self._known = True
        return True

    def prepare(self) -> bool:
        """Before a client's command; False while the TPM is not started."""
        if self._ready:
            return True
        if not self.learn():
            return False
        if self.alone:
            self._sweep()
        self._ready = True
        return True

    def _sweep(self) -> None:
        """Ends what somebody who is gone has left in the TPM. It is asked nothing any more."""
        left, self._left = self._left, Left()
        unknown = [handle for handle in left.saved if self.sessions.find(handle) is None]
        if self._resumed:
            for handle in unknown:
                self.sessions.adopt(handle)
            unknown = []
        for handle in (*left.objects, *left.loaded, *unknown):
            with contextlib.suppress(TpmError):  # it had ended already
                self._inner.flush(handle)

    def suspend(self) -> SavedManager:
        """The manager as plain values; it is not used any more."""
        return SavedManager(
            self.alone,
            self._known,
            self._ready,
            self._resumed,
            self._left,
            self._commands.words,
            self.sessions_max,
            self.objects.slots,
            next(self._numbers),
            next(self._clock),
            self._inner.count,
            self.objects.evictions,
            tuple(connection.suspend() for connection in self.connections.values()),
            self.sessions.suspend(),
        )

    def resume(self, saved: SavedManager) -> None:
        """Goes on where *saved* was suspended; called once, before anything else."""
        self.alone, self._resumed = saved.alone, saved.resumed
        self._known, self._ready, self._left = saved.known, saved.ready, saved.left
        self._commands, self.sessions_max = commands(saved.commands), saved.sessions_max
        self._numbers = itertools.count(saved.next_number)
        self._clock = itertools.count(saved.clock)
        self._inner.count = saved.inner_commands
        self.objects = Objects(self._inner, saved.slots)
        self.objects.evictions = saved.object_evictions
        self.sessions = Sessions(self._inner, saved.sessions.slots, saved.sessions.gap)
        self.sessions.resume(saved.sessions)
        for one in saved.connections:
            found = self.connections[one.number] = Connection(self, one.number, one.user)
            found.resume(one)
            for known in found.objects.values():
                self.objects.resume(known)

    def close(self, connection: Connection) -> None:
        """A client has gone: what it leaves is ended, but for sessions that it saved."""
        if self.connections.pop(connection.number, None) is None:
            return
        self.end_objects(connection)
        self.sessions.abandon(connection.number)
        if self._known:  # else the TPM ends none now
            self.sessions.bound(self.limits.abandoned)

    def end_objects(self, connection: Connection) -> None:
        """All that a client has."""
        for found in connection.objects.values():
            with contextlib.suppress(TpmError):  # it had ended already
                self.objects.flush(found)
        connection.objects.clear()

    # -- a command ------------------------------------------------------------------------

    def process(self, connection: Connection, command: bytes) -> bytes:
        """The response to a connection's command; never raises VtpmError."""
        connection.commands += 1
        if (given := self.passed_on(connection, command)) is not None:
            response = self.tpm.process(given)
            if succeeded(response) or command_code(command) in self._commands.simple:
                return response
        whole = len(command) >= TPM_HEADER_SIZE and command_size(command) == len(command)
        if not whole or command[:2] not in _TAGS:
            return self.tpm.process(command)  # which refuses it
        code = int.from_bytes(command_code(command), "big")
        if code == TpmCc.TPM_CC_Startup or not self.prepare():
            return self._start(command)
        try:
            return self._managed(connection, command, code)
        except Refusal as exc:
            return wire.plain_response(exc.code)

    def passed_on(self, connection: Connection, command: bytes) -> bytes | None:
        """What the TPM itself is given where `_run` has nothing to add; None where it may have.

        A command that has no handle, or uses one object, which is loaded for it, or one session
        that is; one that fails, and has a handle, goes the general way.
        """
        if command[:2] != _NO_SESSIONS:
            return None
        code = command_code(command)
        if code in self._commands.simple:
            return command
        if code not in self._commands.short or len(command) < _ONE_HANDLE_END:
            return None
        size, handle = _SIZE_AND_HANDLE.unpack_from(command)
        if size != len(command):
            return None
        known = connection.objects.get(handle)
        if known is not None:
            known.used = next(self._clock)
            if (physical := known.physical) is None:
                try:
                    physical = self.objects.swap_in(known)
                except (Dead, Refusal):  # the general way says how
                    return None
            head, rest = command[:TPM_HEADER_SIZE], command[_ONE_HANDLE_END:]
            return head + physical.to_bytes(4, "big") + rest
        session = self.sessions.find(handle)
        if session is None or session.owner != connection.number:
            return None
        if session.handle != handle or session.place is not Place.LOADED:
            return None
        session.used = next(self._clock)
        return command

    def _start(self, command: bytes) -> bytes:
        """Of a TPM that is not started, or may be started by this."""
        return self.tpm.process(command)

    def _managed(self, connection: Connection, command: bytes, code: int) -> bytes:
        attributes = self._commands.attributes.get(code)
        if attributes is None or code & _VENDOR:
            raise Refusal(LAYER | TpmRc.TPM_RC_COMMAND_CODE)
        match code:
            case TpmCc.TPM_CC_FlushContext if len(command) == TPM_HEADER_SIZE + 4:
                return self._flush(connection, command)
            case TpmCc.TPM_CC_ContextLoad:
                return self._context_load(connection, command, attributes)
            case TpmCc.TPM_CC_GetCapability if question := wire.capability_question(command):
                return capability(self, connection, command, question)
        return self._run(connection, command, code, attributes)

    def _run(
        self, connection: Connection, command: bytes, code: int, attributes: CommandAttributes
    ) -> bytes:
        """The general way: everything it uses is loaded, it is sent, what it did is noted."""
        handles = wire.handles_of(command, attributes.handles)
        if handles is None:
            raise Refusal(LAYER | TpmRc.TPM_RC_INSUFFICIENT)
        used = Used(self, connection, handles, wire.sessions_of(command, len(handles)))
        if attributes.returns_handle:
            quota.check(self, connection, starts_session=code == TpmCc.TPM_CC_StartAuthSession)
        response = self._send(command, used, code, attributes)
        if _failed(response):
            return response
        self._note_sessions(response, used)
        if attributes.flushes:
            for found in used.objects:
                connection.objects.pop(found.handle, None)
                self.objects.remove(found)
        if code == TpmCc.TPM_CC_ContextSave and used.sessions:
            self.sessions.saved_by_owner(used.sessions[0], response[TPM_HEADER_SIZE:])
        if attributes.extensive:  # those that it has ended are found by that
            with contextlib.suppress(Refusal):  # a TPM in failure mode has none
                self.objects.evict_all()
        if attributes.returns_handle:
            return self._note_handle(connection, response, code)
        return response

    def _send(self, command: bytes, used: Used, code: int, attributes: CommandAttributes) -> bytes:
        starts_session = code == TpmCc.TPM_CC_StartAuthSession
        scratch = (attributes.returns_handle and not starts_session) or code == TpmCc.TPM_CC_Create
        used.load_sessions()
        if starts_session:
            self.sessions.make_room(used.sessions)
        self.objects.make_room(used.slots_needed() + scratch, used.objects)
        while True:
            response = self.tpm.process(wire.with_handles(command, used.load_objects()))
            code_of_it = _code_of(response)
            if not self._can_help(code_of_it, used):
                break
        if code_of_it == TpmRc.TPM_RC_SESSION_HANDLES:  # others of the TPM's clients have them
            raise Refusal(LAYER | code_of_it)
        return response

    def _can_help(self, code: int, used: Used | None = None) -> bool:
        """Whether the same command may pass now; a refused one has changed nothing."""
        if code in NO_ROOM and self.objects.evict(used.objects if used else ()):
            return True
        match code:
            case TpmRc.TPM_RC_SESSION_MEMORY | TpmRc.TPM_RC_MEMORY:
                return self.sessions.evict(used.sessions if used else ())
            case TpmRc.TPM_RC_CONTEXT_GAP:
                return self.sessions.refresh_oldest()
            case TpmRc.TPM_RC_SESSION_HANDLES:
                return self.sessions.drop_abandoned()
        return False

    def _note_sessions(self, response: bytes, used: Used) -> None:
        """A session ends by its response, not by the request: a failed command ends none."""
        if not used.authorizations:
            return
        lives = wire.continued(response, len(used.authorizations))
        for found, on in zip(used.authorizations, lives, strict=True):
            if found is not None and not on:
                self.sessions.remove(found)

    def _note_handle(self, connection: Connection, response: bytes, code: int) -> bytes:
        handle = wire.response_handle(response)
        if handle is None:
            raise Refusal(LAYER | TpmRc.TPM_RC_FAILURE)
        if kind_of(handle) in SESSIONS:
            found = Session(handle, connection.number, used=self.now())
            self.sessions.add(found)
            return response
        changes = code in _SEQUENCES
        new = Object(connection.number, connection.next_handle(), changes, handle, used=self.now())
        connection.objects[new.handle] = new
        self.objects.add(new)
        return wire.with_response_handle(response, new.handle)

    def now(self) -> int:
        """Counts commands that use something."""
        return next(self._clock)

    # -- commands with a meaning of their own ---------------------------------------------

    def _flush(self, connection: Connection, command: bytes) -> bytes:
        (handle,) = wire.handles_of(command, 1) or (0,)
        kind = kind_of(handle)
        if kind != TpmHt.TRANSIENT and kind not in SESSIONS:
            return self.tpm.process(command)  # which refuses it
        try:
            if kind == TpmHt.TRANSIENT:
                self.objects.flush(connection.objects.pop(handle))
            else:
                session = self.sessions.find(handle)
                if session is None or session.owner not in {connection.number, None}:
                    raise Refusal(LAYER | TpmRc.TPM_RC_HANDLE_P1)
                self.sessions.flush(session)
        except KeyError:
            raise Refusal(LAYER | TpmRc.TPM_RC_HANDLE_P1) from None
        except TpmError as exc:
            raise Refusal(exc.code) from exc
        return wire.plain_response(0)

    def _context_load(
        self, connection: Connection, command: bytes, attributes: CommandAttributes
    ) -> bytes:
        context = command[TPM_HEADER_SIZE:]
        head = Context.of(context)
        if head is None or command[:2] != b"\x80\x01":
            return self.tpm.process(command)  # which refuses it
        if kind_of(head.handle) in SESSIONS:
            return self._session_load(connection, command, context, head)
        response = self._run(connection, command, TpmCc.TPM_CC_ContextLoad, attributes)
        if not _failed(response):
            found = connection.objects[wire.response_handle(response) or 0]
            found.changes = head.handle == wire.SEQUENCE_OBJECT
            if not found.changes:
                found.context = context
        return response

    def _session_load(
        self, connection: Connection, command: bytes, context: bytes, head: Context
    ) -> bytes:
        """The context is the permission: who has it takes the session over, and uses it up."""
        found = self.sessions.find(head.handle)
        if found is None or found.owner != connection.number:
            quota.check_sessions(self, connection, found)
        self.sessions.make_room(())
        known = found is not None and found.place is Place.SAVED
        if found is None or not known or found.digest != digest_of(context):  # the TPM knows
            while self._can_help(_code_of(response := self.tpm.process(command))):
                pass
            if not _failed(response):
                self._note_handle(connection, response, TpmCc.TPM_CC_ContextLoad)
            return response
        try:
            self.sessions.load(found, ())
        except Dead:
            raise Refusal(LAYER | TpmRc.TPM_RC_HANDLE_P1) from None
        found.owner, found.digest, found.used = connection.number, b"", self.now()
        return wire.plain_response(0, found.handle.to_bytes(4, "big"))


class Connection:
    """One client of a manager (implements `engine.base.Tpm`).

    Attributes:
        number: Tells it apart from others, past ones too.
        user: Whose it is, for the limits of a user's.
        objects: Its transient objects, by the handles it knows.
        commands: How many it has given.
    """

    tpm2 = True

    def __init__(self, manager: Manager, number: int, user: int | None) -> None:
        self._manager = manager
        self.number, self.user = number, user
        self.objects: dict[int, Object] = {}
        self.commands = 0
        self._next = _FIRST_OBJECT

    def process(self, command: bytes) -> bytes:
        """One command, one response."""
        return self._manager.process(self, command)

    def passed_on(self, command: bytes) -> bytes | None:
        """See `Manager.passed_on`."""
        return self._manager.passed_on(self, command)

    def cancel(self) -> int:
        """Asks a running command to end early; only while it is this connection's."""
        return self._manager.tpm.cancel()

    def flushes_none(self, command: bytes) -> bool:
        """Whether a command would flush a transient object that is none of this connection's."""
        if command_code(command) != _FLUSH or len(command) != _ONE_HANDLE_END:
            return False
        handle = int.from_bytes(command[TPM_HEADER_SIZE:], "big")
        return kind_of(handle) == TpmHt.TRANSIENT and handle not in self.objects

    def close(self) -> None:
        """Ends what it leaves; again is harmless."""
        self._manager.close(self)

    def suspend(self) -> SavedConnection:
        """The connection as plain values."""
        objects = tuple(found.suspend() for found in self.objects.values())
        return SavedConnection(self.number, self.user, self._next, self.commands, objects)

    def resume(self, saved: SavedConnection) -> None:
        """As it was suspended."""
        self._next, self.commands = saved.next_handle, saved.commands
        self.objects = {one.handle: Object(self.number, *one) for one in saved.objects}

    def next_handle(self) -> int:
        """Ascending, as lists must be; none is used again before all were."""
        while True:
            handle = self._next
            self._next = _FIRST_OBJECT if handle == _LAST_OBJECT else handle + 1
            if handle not in self.objects:
                return handle


_SEQUENCES: Final = frozenset({0x15B, 0x186})  # TPM2_HMAC_Start, TPM2_HashSequenceStart


def _code_of(response: bytes) -> int:
    try:
        return response_code(response)
    except WireError:
        return TpmRc.TPM_RC_FAILURE


def _failed(response: bytes) -> bool:
    return not succeeded(response)
