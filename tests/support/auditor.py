"""A client that has its commands audited by an HMAC session."""

from __future__ import annotations

import hashlib
import hmac
from typing import TYPE_CHECKING, Final

from tests.support import managed as m
from tests.support.commands import code_of, tpm2

if TYPE_CHECKING:
    from collections.abc import Callable

    Process = Callable[[bytes], bytes]

GOES_ON: Final = 0x01
EXCLUSIVE: Final = 0x02
AUDIT: Final = 0x80


class Auditor:
    """A client that has each of its commands audited by one session."""

    def __init__(self, process: Process) -> None:
        self.process = process
        answer = process(m.start_session(0))
        self.handle, self._nonce = m.handle_of(answer), answer[16:]

    def audit(
        self,
        *,
        code: int = 0x17B,
        handles: bytes = b"",
        before: bytes = b"",
        parameters: bytes = b"\0\4",
        attributes: int = AUDIT | GOES_ON,
    ) -> int:
        """Gives a command, TPM2_GetRandom say; returns the session attributes of the answer."""
        names = b"".join(handles[at : at + 4] for at in range(0, len(handles), 4))
        digest = hashlib.sha256(m.u32(code) + names + parameters).digest()
        proof = hmac.digest(b"", digest + bytes(16) + self._nonce + bytes([attributes]), "sha256")
        area = before + m.u32(self.handle) + m.sized(bytes(16)) + bytes([attributes])
        area += m.sized(proof)
        body = handles + m.u32(len(area)) + area + parameters
        answer = self.process(tpm2(code, body, sessions=True))
        assert code_of(answer) == 0, answer.hex()
        last = answer[-(2 + 16 + 1 + 2 + 32) :]
        self._nonce = last[2:18]
        return last[18]

    @property
    def is_exclusive(self) -> bool:
        return bool(self.audit() & EXCLUSIVE)
