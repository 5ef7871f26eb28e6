"""A manager in front of a TPM that others use besides, past it: the kernel, and its own manager.

They may end what a client has, and need room themselves. So an object is saved as soon as it is
there, what a pause leaves loaded is taken out, and what the TPM says is missing is looked for, which
also tells that the machine has slept. What others have is theirs: what they left loaded makes room
as a client's does, and is loaded again in the end.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final

from vtpm_cuse.errors import TpmError
from vtpm_cuse.resmgr.manager import Manager
from vtpm_cuse.resmgr.objects import Object
from vtpm_cuse.resmgr.refusal import LAYER, Dead, Refusal
from vtpm_cuse.resmgr.saved import Left
from vtpm_cuse.resmgr.sessions import Place, Session
from vtpm_cuse.wire import tpm2_handles as wire
from vtpm_cuse.wire.tpm import TpmCc, TpmRc, command_code, response_code, succeeded
from vtpm_cuse.wire.tpm2_handles import TpmHt

if TYPE_CHECKING:
    from collections.abc import Callable

    from vtpm_cuse.engine.base import Tpm
    from vtpm_cuse.resmgr.manager import Connection
    from vtpm_cuse.resmgr.quota import Limits
    from vtpm_cuse.resmgr.used import Used
    from vtpm_cuse.wire.tpm2_handles import CommandAttributes

_OTHERS: Final = 0
"""No connection has this number."""
_SHUTDOWN: Final = TpmCc.TPM_CC_Shutdown.to_bytes(4, "big")
_UNDO_NO_SHUTDOWN: Final = frozenset(
    {TpmCc.TPM_CC_ReadPublic, TpmCc.TPM_CC_StartAuthSession, TpmCc.TPM_CC_ContextLoad}
)
"""Of the commands with handles: behind them TPM2_Startup(STATE) is still possible."""
_LOOKS_MAX: Final = 3
"""For what is missing, at one command: a TPM may say so for ever."""
_WITHOUT_HANDLES: Final = frozenset(
    code.to_bytes(4, "big")
    for code in (TpmCc.TPM_CC_Startup, TpmCc.TPM_CC_SelfTest, TpmCc.TPM_CC_GetTestResult)
)


class SharedManager(Manager):
    """As `Manager`.

    Args:
        tpm: The TPM.
        inner: As there.
        limits: As there.
        alone: As there, once: what others leave later on is theirs.
        slots: Objects, and sessions, that surely fit at a time, whatever the TPM says; 0 leaves it.

    Attributes:
        found: How many objects and sessions of others were there at the start.
        on_gap: Called once a start where the TPM can save no session, with the handles of those
            that others have saved, of which one is too old.
    """

    def __init__(
        self,
        tpm: Tpm,
        *,
        inner: Callable[[bytes], bytes] | None = None,
        limits: Limits | None = None,
        alone: bool = False,
        slots: int = 0,
    ) -> None:
        super().__init__(tpm, inner=inner, limits=limits, alone=alone)
        self._slots = slots
        self._shut = self._gap_said = False
        self._looks = 0
        self._others: list[Object] = []
        self.found = (0, 0)
        self.on_gap: Callable[[list[int]], None] = lambda _: None

    def learn(self) -> bool:
        """As there."""
        if self._known:
            return True
        if not super().learn():
            return False
        if self._slots:
            self.objects.slots = min(self.objects.slots, self._slots)
            self.sessions.slots = min(self.sessions.slots, self._slots)
        return True

    def prepare(self) -> bool:
        """As there, and sees what others have left."""
        if self._ready:
            return True
        if not super().prepare():
            return False
        self.alone = False
        self._take_in()
        return True

    def _take_in(self) -> None:
        """What is loaded is nobody's who could miss it now: who had the TPM has left it."""
        (objects, loaded, saved), self._left = self._left, Left()
        self.found = (len(objects), len(loaded) + len(saved))
        # Any may be a sequence, of which an old copy is worse than none.
        self._others = [Object(_OTHERS, handle, True, handle) for handle in objects]
        for found in self._others:
            self.objects.add(found)
        for handle in loaded:
            self.sessions.add(Session(handle, _OTHERS))

    def drop(self) -> None:
        """As there, and what others have left is as it was."""
        theirs = self.sessions.of(_OTHERS)
        for session in theirs:
            self.sessions.remove(session)
        super().drop()
        self.sessions.drop_all()  # nobody knows of a manager that comes after this one
        with contextlib.suppress(Refusal, Dead):
            for found in self._others:
                self.objects.load(found, ())
        with contextlib.suppress(Refusal, Dead):
            for session in theirs:
                if session.place is not Place.LOADED:
                    self.sessions.load(session, ())

    def reset(self, *, resumed: bool = False) -> None:
        """As there."""
        super().reset(resumed=resumed)
        self._shut = self._gap_said = False
        self._others = []

    def rest(self, *, sessions: bool) -> None:
        """Takes out of the TPM what clients have loaded: all objects, and *sessions* if so wanted.

        Not behind a TPM2_Shutdown, which it would undo, until a client does. Never raises.
        """
        if self._shut or not self._ready:
            return
        with contextlib.suppress(Refusal):  # the TPM cannot, now
            self.objects.evict_all()
            while sessions and self.sessions.evict(()):
                pass

    def process(self, connection: Connection, command: bytes) -> bytes:
        """As there."""
        if command_code(command) != _SHUTDOWN:
            response = super().process(connection, command)
            if response_code(response) == TpmRc.TPM_RC_CONTEXT_GAP:
                self._tell_of_gap()
            return response
        self.rest(sessions=True)  # what is loaded does not outlive what a shutdown announces
        response = super().process(connection, command)
        self._shut = succeeded(response)
        return response

    def _tell_of_gap(self) -> None:
        """Nobody here can refresh what others have saved."""
        if self._gap_said:
            return
        self._gap_said = True
        with contextlib.suppress(TpmError):
            saved = self._inner.handles(TpmHt.POLICY_SESSION << 24)
            self.on_gap([one for one in saved if self.sessions.find(one) is None])

    def _start(self, command: bytes) -> bytes:
        """Nothing with handles gets past the manager while it does not know the TPM."""
        if command_code(command) in _WITHOUT_HANDLES:
            return super()._start(command)
        try:
            self._inner.commands()
        except TpmError as exc:
            return wire.plain_response(exc.code)
        return wire.plain_response(LAYER | TpmRc.TPM_RC_FAILURE)

    def _run(
        self, connection: Connection, command: bytes, code: int, attributes: CommandAttributes
    ) -> bytes:
        self._shut = self._shut and code in _UNDO_NO_SHUTDOWN
        self._looks = _LOOKS_MAX
        return super()._run(connection, command, code, attributes)

    def _can_help(self, code: int, used: Used | None = None) -> bool:
        missing = used.named(code) if used is not None and self._looks else None
        if used is None or missing is None:
            return super()._can_help(code, used)
        self._looks -= 1
        if isinstance(missing, Session):
            self.sessions.remove(missing)
        else:
            self.objects.lose(missing)
        # Taking all out finds what else has gone, and ends no exclusive audit session.
        self.rest(sessions=True)
        used.load_sessions()
        return not isinstance(missing, Session)

    def _note_handle(self, connection: Connection, response: bytes, code: int) -> bytes:
        answer = super()._note_handle(connection, response, code)
        new = connection.objects.get(wire.response_handle(answer) or 0)
        # A loaded context is a copy already, and a sequence has none that lasts.
        lasts = new is not None and not new.changes and code != TpmCc.TPM_CC_ContextLoad
        if new is not None and lasts and new.physical is not None:
            with contextlib.suppress(TpmError):
                new.context = self._inner.save(new.physical)
        return answer
