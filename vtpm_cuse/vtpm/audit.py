"""Which session the TPM has as the exclusive audit session, told by its answers.

Such a session proves that nobody else's command came between those that it audits. Any successful
command without it ends that, but for those that take no session. So whoever asks the TPM something
on his own account must know. Source: TCG TPM 2.0 Library Part 1, "Exclusive Audit Session".
"""

from __future__ import annotations

from typing import Final

from vtpm_cuse.wire.tpm import TPM_HEADER_SIZE, TpmCc, command_code
from vtpm_cuse.wire.tpm2_handles import (
    SESSIONS,
    SESSIONS_TAG,
    UNKNOWN_SESSION,
    exclusive_audit_session,
    index_of,
    kind_of,
)

_SUCCESS: Final = bytes(4)
_FLUSH: Final = TpmCc.TPM_CC_FlushContext.to_bytes(4, "big")
_LEAVE_IT: Final = frozenset(
    code.to_bytes(4, "big") for code in (TpmCc.TPM_CC_ContextSave, TpmCc.TPM_CC_ContextLoad)
)


class AuditWatch:
    """Is shown what the TPM answers.

    Attributes:
        session: The exclusive audit session; 0 for none. Where there may be one and nobody can
            tell which, as in a state from elsewhere, `UNKNOWN_SESSION`.
    """

    def __init__(self) -> None:
        self.session = 0

    def begin(self, *, resumed: bool) -> None:
        """The TPM was started: anew, or from where another left off."""
        self.session = UNKNOWN_SESSION if resumed else 0

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
