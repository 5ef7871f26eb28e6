"""Which session the TPM has as the exclusive audit session, told by its answers.

Such a session proves that nobody else's command came between those that it audits. Any successful
command without it ends that, but for those that take no session. So whoever asks the TPM something
on his own account must know. Source: TCG TPM 2.0 Library Part 1, "Exclusive Audit Session".
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final

from vtpm_cuse.engine.base import StateType
from vtpm_cuse.wire.tpm import TPM_HEADER_SIZE, TpmCc, command_code
from vtpm_cuse.wire.tpm2_handles import (
    SESSIONS,
    SESSIONS_TAG,
    exclusive_audit_session,
    index_of,
    kind_of,
)
from vtpm_cuse.wire.volatile import exclusive_session_in, with_exclusive_session

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vtpm_cuse.engine.base import Engine

_SUCCESS: Final = bytes(4)
_FLUSH: Final = TpmCc.TPM_CC_FlushContext.to_bytes(4, "big")
_LEAVE_IT: Final = frozenset(
    code.to_bytes(4, "big") for code in (TpmCc.TPM_CC_ContextSave, TpmCc.TPM_CC_ContextLoad)
)


class AuditWatch:
    """Is shown what the TPM answers.

    Attributes:
        session: The exclusive audit session; 0 for none. Where there may be one and nobody can
            tell which, `UNKNOWN_SESSION`.
    """

    def __init__(self) -> None:
        self.session = 0

    def begin(self, volatile: bytes | None) -> None:
        """The TPM was started: anew, or where another left off, and this is its volatile state."""
        self.session = 0 if volatile is None else exclusive_session_in(volatile)

    @contextlib.contextmanager
    def kept(self, engine: Engine) -> Iterator[None]:
        """What is asked meanwhile ends none: *engine* begins once more behind it, where it was.

        Raises:
            VtpmError: It does not begin; it is off.
        """
        session = self.session
        yield
        if session:
            volatile = with_exclusive_session(engine.volatile_state(), session)
            engine.stop()
            engine.set_state(StateType.VOLATILE, volatile)
            engine.start()
            self.session = session

    def note(self, command: bytes, answer: bytes) -> None:
        """An answer with sessions; while there is an exclusive one, any answer."""
        if answer[6:TPM_HEADER_SIZE] != _SUCCESS:
            return
        code = command_code(command)
        if answer[:2] == SESSIONS_TAG:
            self.session = exclusive_audit_session(command, answer)
        elif code == _FLUSH:
            handle = int.from_bytes(command[TPM_HEADER_SIZE:], "big")
            if kind_of(handle) in SESSIONS and index_of(handle) == index_of(self.session):
                self.session = 0
        elif code not in _LEAVE_IT:
            self.session = 0
