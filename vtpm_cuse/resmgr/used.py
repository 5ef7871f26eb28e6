"""What one command of a connection uses: looked up, and loaded all at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vtpm_cuse.resmgr.refusal import LAYER, Dead, Refusal
from vtpm_cuse.wire.tpm import TpmRc
from vtpm_cuse.wire.tpm2_handles import SESSIONS, TpmHt, kind_of

if TYPE_CHECKING:
    from vtpm_cuse.resmgr.manager import Connection, Manager
    from vtpm_cuse.resmgr.objects import Object
    from vtpm_cuse.resmgr.sessions import Session
    from vtpm_cuse.wire.tpm2_handles import UsedSession


class Used:
    """What one command uses. Raises Refusal for anything that is not its connection's."""

    def __init__(
        self,
        manager: Manager,
        connection: Connection,
        handles: tuple[int, ...],
        authorizations: tuple[UsedSession, ...],
    ) -> None:
        self._manager = manager
        self._connection = connection
        self._handles = handles
        self.objects: list[Object] = []
        self.sessions: list[Session] = []
        self.authorizations: list[Session | None] = []
        self._named: dict[int, Object | Session] = {}
        for place, handle in enumerate(handles):
            if kind_of(handle) == TpmHt.TRANSIENT:
                self._use_object(handle, TpmRc.TPM_RC_REFERENCE_H0 + place)
            elif kind_of(handle) in SESSIONS:
                self._use_session(handle, TpmRc.TPM_RC_REFERENCE_H0 + place)
        for place, used in enumerate(authorizations):
            found = None
            if kind_of(used.handle) in SESSIONS:
                found = self._use_session(used.handle, TpmRc.TPM_RC_REFERENCE_S0 + place)
            self.authorizations.append(found)

    def _use_object(self, handle: int, code: int) -> None:
        found = self._connection.objects.get(handle)
        if found is None:
            raise Refusal(LAYER | code)
        found.used = self._manager.now()
        self._named[code] = found
        if found not in self.objects:
            self.objects.append(found)

    def _use_session(self, handle: int, code: int) -> Session:
        found = self._manager.sessions.refuse_unowned(handle, self._connection.number, code)
        found.used = self._manager.now()
        self._named[code] = found
        if found not in self.sessions:
            self.sessions.append(found)
        return found

    def named(self, code: int) -> Object | Session | None:
        """What the TPM means by TPM_RC_REFERENCE_*, a place in the command."""
        return self._named.get(code)

    def slots_needed(self) -> int:
        """Objects that are to be loaded, and persistent ones, which take a slot for as long."""
        missing = sum(found.physical is None for found in self.objects)
        return missing + sum(kind_of(handle) == TpmHt.PERSISTENT for handle in self._handles)

    def load_sessions(self) -> None:
        """All of them. Raises Refusal."""
        try:
            self._manager.sessions.load_all(self.sessions)
        except Dead as exc:
            places = (code for code, found in self._named.items() if found is exc.args[0])
            raise Refusal(LAYER | next(places)) from exc

    def load_objects(self) -> tuple[int, ...]:
        """The handle area in the TPM's numbers. Raises Refusal."""
        physical: list[int] = []
        for place, handle in enumerate(self._handles):
            if kind_of(handle) != TpmHt.TRANSIENT:
                physical.append(handle)
                continue
            found = self._connection.objects[handle]
            try:
                physical.append(self._manager.objects.load(found, self.objects))
            except Dead:
                if found.context is None:
                    del self._connection.objects[handle]
                raise Refusal(LAYER | TpmRc.TPM_RC_REFERENCE_H0 + place) from None
        return tuple(physical)
