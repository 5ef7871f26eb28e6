"""Where a TPM 2.0 command and its response keep handles, sessions and contexts.

What a resource manager must read and rewrite, and no more. Sources: TCG TPM 2.0
Library Part 1, section 18 (command and response structure), Part 2 (TPMA_CC,
TPMS_CONTEXT, TPM_HT, TPM_CAP), Part 3 (the commands named here).
"""

import struct
from enum import IntEnum
from typing import Final, NamedTuple

from vtpm_cuse.wire.tpm import TPM_HEADER_SIZE, TpmCc, TpmTag

HANDLE_SIZE: Final = 4
CONTEXT_HEADER_SIZE: Final = 18
"""Bytes of a TPMS_CONTEXT before its blob: sequence, savedHandle, hierarchy, size."""

TPM_CAP_HANDLES: Final = 1
TPM_CAP_COMMANDS: Final = 2
TPM_CAP_TPM_PROPERTIES: Final = 6

TPM_PT_HR_TRANSIENT_MIN: Final = 0x10E
TPM_PT_HR_LOADED_MIN: Final = 0x110
TPM_PT_ACTIVE_SESSIONS_MAX: Final = 0x111
TPM_PT_CONTEXT_GAP_MAX: Final = 0x114
TPM_PT_MAX_COMMAND_SIZE: Final = 0x11E
TPM_PT_HR_LOADED: Final = 0x203
TPM_PT_HR_LOADED_AVAIL: Final = 0x204
TPM_PT_HR_ACTIVE: Final = 0x205
TPM_PT_HR_ACTIVE_AVAIL: Final = 0x206
TPM_PT_HR_TRANSIENT_AVAIL: Final = 0x207

SEQUENCE_OBJECT: Final = 0x80000001
"""The savedHandle of a sequence object, whose state changes with every use."""

_NUMBERS: Final = struct.Struct(">HII")
_SESSION_ATTRIBUTE_CONTINUE: Final = 0x01
_SESSION_ATTRIBUTE_AUDIT_EXCLUSIVE: Final = 0x02
_LASTS: Final = _SESSION_ATTRIBUTE_CONTINUE | _SESSION_ATTRIBUTE_AUDIT_EXCLUSIVE
_HANDLES_MAX: Final = 3
UNKNOWN_SESSION: Final = 0xFFFF_FFFF
HANDLE_GIVERS: Final = frozenset(
    code.to_bytes(4, "big")
    for code in (
        *(TpmCc.TPM_CC_CreatePrimary, TpmCc.TPM_CC_Load, TpmCc.TPM_CC_HMAC_Start),
        *(TpmCc.TPM_CC_ContextLoad, TpmCc.TPM_CC_LoadExternal, TpmCc.TPM_CC_StartAuthSession),
        *(TpmCc.TPM_CC_HashSequenceStart, TpmCc.TPM_CC_CreateLoaded),
    )
)
"""Codes of the commands whose response begins with a handle, as any TPM says of them (TPMA_CC)."""
SESSIONS_TAG: Final = TpmTag.TPM_ST_SESSIONS.to_bytes(2, "big")


class TpmHt(IntEnum):
    """The top byte of a handle (TPM_HT): those that a manager looks at."""

    HMAC_SESSION = 0x02  # and in lists, loaded sessions of any kind
    POLICY_SESSION = 0x03  # and in lists, saved sessions of any kind
    TRANSIENT = 0x80
    PERSISTENT = 0x81


SESSIONS: Final = frozenset({TpmHt.HMAC_SESSION, TpmHt.POLICY_SESSION})
_PERMANENT: Final = 0x40  # of these, the password authorizes
_AUTHORIZE: Final = SESSIONS | {_PERMANENT}


class CommandAttributes(NamedTuple):
    """TPMA_CC: what the TPM says of a command.

    Attributes:
        handles: How many handles it begins with.
        returns_handle: Its response begins with one.
        flushes: A successful one ends the transient object it uses.
        extensive: It may end objects that it does not name.
    """

    handles: int
    returns_handle: bool
    flushes: bool
    extensive: bool

    @classmethod
    def of(cls, value: int) -> tuple[int, "CommandAttributes"]:
        """Command code, the vendor bit included, and attributes."""
        code = value & 0xFFFF | value & 0x2000_0000
        # libtpms says 0 for FlushContext, whose handle is a parameter, as it is of no session.
        handles = 1 if code == TpmCc.TPM_CC_ContextSave else value >> 25 & 7
        return code, cls(
            handles, bool(value >> 28 & 1), bool(value >> 24 & 1), bool(value >> 23 & 1)
        )


class UsedSession(NamedTuple):
    """One entry of an authorization area."""

    handle: int
    attributes: int


def kind_of(handle: int) -> int:
    """The top byte."""
    return handle >> 24


def index_of(handle: int) -> int:
    """What tells sessions apart; the top byte only names their kind."""
    return handle & 0x00FF_FFFF


def handles_of(command: bytes, count: int) -> tuple[int, ...] | None:
    """The handle area; None where the command is too short for it."""
    end = TPM_HEADER_SIZE + HANDLE_SIZE * count
    if len(command) < end:
        return None
    return struct.unpack_from(f">{count}I", command, TPM_HEADER_SIZE)


def with_handles(command: bytes, handles: tuple[int, ...]) -> bytes:
    """The command with another handle area of the same size."""
    end = TPM_HEADER_SIZE + HANDLE_SIZE * len(handles)
    return command[:TPM_HEADER_SIZE] + struct.pack(f">{len(handles)}I", *handles) + command[end:]


def sessions_of(command: bytes, handles: int) -> tuple[UsedSession, ...]:
    """The authorization area behind that many handles, as far as it can be read.

    One that cannot be read whole is refused by the TPM.
    """
    if command[:2] != SESSIONS_TAG:
        return ()
    at = TPM_HEADER_SIZE + HANDLE_SIZE * handles
    size = int.from_bytes(command[at : at + 4], "big")
    at += 4
    end = min(at + size, len(command))
    found: list[UsedSession] = []
    while at + 4 + 2 <= end:
        handle = int.from_bytes(command[at : at + 4], "big")
        nonce = int.from_bytes(command[at + 4 : at + 6], "big")
        attributes = at + 6 + nonce
        if attributes + 3 > end:
            break
        found.append(UsedSession(handle, command[attributes]))
        at = attributes + 3 + int.from_bytes(command[attributes + 1 : attributes + 3], "big")
    return tuple(found)


def answered_attributes(response: bytes) -> tuple[int, ...]:
    """The session attributes in a successful response with sessions, as far as it has them."""
    at = TPM_HEADER_SIZE
    size = int.from_bytes(response[at : at + 4], "big")
    if size > len(response):  # a handle, which comes first and is a greater number
        at += HANDLE_SIZE
        size = int.from_bytes(response[at : at + 4], "big")
    at += 4 + size
    found: list[int] = []
    while at < len(response):
        at += 2 + int.from_bytes(response[at : at + 2], "big")
        found += response[at : at + 1]
        at += 3 + int.from_bytes(response[at + 1 : at + 3], "big")
    return tuple(found)


def continued(response: bytes, count: int) -> list[bool]:
    """Of a successful response to a command with *count* sessions: which of these live on.

    Those of which the response says nothing do: the TPM is asked when they are used next.
    """
    attributes = answered_attributes(response)[:count]
    found = [bool(one & _SESSION_ATTRIBUTE_CONTINUE) for one in attributes]
    return found + [True] * (count - len(found))


def exclusive_audit_session(command: bytes, response: bytes) -> int:
    """The session that a successful response with sessions calls exclusive and goes on.

    0 for none; `UNKNOWN_SESSION` where the command does not show which it is. Its handles are found
    by where an authorization area fits.
    """
    lasting = [_LASTS & ~on == 0 for on in answered_attributes(response)]
    if not any(lasting):
        return 0
    for handles in range(_HANDLES_MAX + 1):
        used = sessions_of(command, handles)
        if len(used) == len(lasting) and all(kind_of(one.handle) in _AUTHORIZE for one in used):
            return used[lasting.index(True)].handle
    return UNKNOWN_SESSION


def response_handle(response: bytes) -> int | None:
    """The handle of a successful response that has one, in both response forms."""
    if len(response) < TPM_HEADER_SIZE + HANDLE_SIZE:
        return None
    return int.from_bytes(response[TPM_HEADER_SIZE : TPM_HEADER_SIZE + HANDLE_SIZE], "big")


def with_response_handle(response: bytes, handle: int) -> bytes:
    """The response with another handle. An rpHash covers code and parameters, not this."""
    end = TPM_HEADER_SIZE + HANDLE_SIZE
    return response[:TPM_HEADER_SIZE] + handle.to_bytes(HANDLE_SIZE, "big") + response[end:]


def plain_command(code: int, body: bytes) -> bytes:
    """A command without sessions."""
    size = TPM_HEADER_SIZE + len(body)
    return _NUMBERS.pack(TpmTag.TPM_ST_NO_SESSIONS, size, code) + body


def plain_response(code: int, body: bytes = b"") -> bytes:
    """A response without sessions."""
    return plain_command(code, body)


def context_save(handle: int) -> bytes:
    """TPM2_ContextSave."""
    return plain_command(TpmCc.TPM_CC_ContextSave, handle.to_bytes(HANDLE_SIZE, "big"))


def context_load(context: bytes) -> bytes:
    """TPM2_ContextLoad."""
    return plain_command(TpmCc.TPM_CC_ContextLoad, context)


def flush_context(handle: int) -> bytes:
    """TPM2_FlushContext."""
    return plain_command(TpmCc.TPM_CC_FlushContext, handle.to_bytes(HANDLE_SIZE, "big"))


def get_capability(capability: int, first: int, count: int) -> bytes:
    """TPM2_GetCapability."""
    return plain_command(TpmCc.TPM_CC_GetCapability, struct.pack(">III", capability, first, count))


class CapabilityList(NamedTuple):
    """A TPMS_CAPABILITY_DATA whose elements are words, and whether there are more."""

    more: bool
    capability: int
    words: tuple[int, ...]

    @classmethod
    def of(cls, response: bytes, words: int = 1) -> "CapabilityList | None":
        """Of a successful response; *words* are those of one element. None for nonsense."""
        body = response[TPM_HEADER_SIZE:]
        if len(body) < 9:
            return None
        more, capability, count = struct.unpack_from(">BII", body)
        total = count * words
        if len(body) != 9 + 4 * total:
            return None
        return cls(bool(more), capability, struct.unpack_from(f">{total}I", body, 9))

    def pack(self, words: int = 1) -> bytes:
        """The successful response."""
        count = len(self.words) // words
        head = struct.pack(">BII", self.more, self.capability, count)
        return plain_response(0, head + struct.pack(f">{len(self.words)}I", *self.words))


def capability_question(command: bytes) -> tuple[int, int, int] | None:
    """What a TPM2_GetCapability without sessions asks: capability, first, count. Else None."""
    if len(command) != TPM_HEADER_SIZE + 12 or command[:2] != b"\x80\x01":
        return None
    capability, first, count = struct.unpack_from(">III", command, TPM_HEADER_SIZE)
    return capability, first, count


class Context(NamedTuple):
    """The head of a TPMS_CONTEXT.

    Attributes:
        sequence: The TPM's counter at the time of the save.
        handle: savedHandle.
    """

    sequence: int
    handle: int

    @classmethod
    def of(cls, context: bytes) -> "Context | None":
        """None where it is too short to be one."""
        if len(context) < CONTEXT_HEADER_SIZE:
            return None
        return cls(*struct.unpack_from(">QI", context))
