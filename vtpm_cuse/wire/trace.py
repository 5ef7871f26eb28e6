"""A TPM command and its response as people read them, with nothing secret in it.

Shown is what the specifications leave in the open: names, handles, sessions with their
attributes, sizes, the response code. Of parameters, nonces, passwords and HMACs there is the
size alone; the exceptions are the parameters in `_DETAILS`, which say what a command is about.

Nothing here raises: what does not fit the specification is described as far as it does.

Sources: TCG TPM 2.0 Library Part 1, section 18 (command and response structure); TCG TPM 1.2
Main Part 1, section 13 (the same, and authorization).
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from vtpm_cuse.errors import WireError
from vtpm_cuse.wire import names, tpm2, tpm12
from vtpm_cuse.wire.marshal import Reader
from vtpm_cuse.wire.rc import Explained, explain
from vtpm_cuse.wire.tpm import (
    TPM_CC_SET_LOCALITY,
    TPM_HEADER_SIZE,
    TpmCc,
    TpmOrdinal,
    TpmTag,
    command_code,
    command_size,
    response_code,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    Details = tuple[tuple[str, str], ...]

_TAGS2: Final = frozenset({TpmTag.TPM_ST_NO_SESSIONS, TpmTag.TPM_ST_SESSIONS})
_SESSIONS12: Final[dict[int, int]] = {
    TpmTag.TPM_TAG_RQU_COMMAND: 0,
    TpmTag.TPM_TAG_RQU_AUTH1_COMMAND: 1,
    TpmTag.TPM_TAG_RQU_AUTH2_COMMAND: 2,
}
_RESPONSE_SESSIONS12: Final[dict[int, int]] = {
    TpmTag.TPM_TAG_RSP_COMMAND: 0,
    TpmTag.TPM_TAG_RSP_AUTH1_COMMAND: 1,
    TpmTag.TPM_TAG_RSP_AUTH2_COMMAND: 2,
}
_AUTHORIZATION_SIZE12: Final = 45
_RESPONSE_AUTHORIZATION_SIZE12: Final = 41
_EPOCH: Final = datetime(1970, 1, 1)


class Session(NamedTuple):
    """One entry of a command's authorization area."""

    handle: str
    attributes: tuple[str, ...]


class Command(NamedTuple):
    """A command.

    Attributes:
        name: "TPM2_GetRandom", the code in hex, or "?" where there is none to be seen.
        size: Bytes that came.
        handles: Names of its handles.
        sessions: Its authorizations.
        details: What it is about, names and values.
        parameters: Bytes of parameters.
        faults: What does not fit the specification, in clauses.
    """

    name: str
    size: int
    handles: tuple[str, ...] = ()
    sessions: tuple[Session, ...] = ()
    details: Details = ()
    parameters: int = 0
    faults: tuple[str, ...] = ()


class Response(NamedTuple):
    """A response.

    Attributes:
        result: Its code; None where there is none to be seen.
        size: Bytes that came.
        handles: Names of its handles.
        sessions: How many sessions have answered.
        parameters: Bytes of parameters.
        faults: What does not fit the specification, in clauses.
    """

    result: Explained | None
    size: int
    handles: tuple[str, ...] = ()
    sessions: int = 0
    parameters: int = 0
    faults: tuple[str, ...] = ()


class Decoded(NamedTuple):
    """A command with its response.

    Attributes:
        micros: When it was sent, in microseconds since 1970; None if nobody knows.
        duration: Microseconds until the response came; None likewise.
        tpm12: It is of TPM 1.2.
        command: The command.
        response: Its response; None where none came.
    """

    micros: int | None
    duration: int | None
    tpm12: bool
    command: Command
    response: Response | None


def decode(
    command: bytes,
    response: bytes | None = None,
    *,
    micros: int | None = None,
    duration: int | None = None,
) -> Decoded:
    """Reads a command and its response, whatever they are.

    Args:
        command: As it was sent; of both versions.
        response: As it came, None without one.
        micros: When, in microseconds since 1970.
        duration: How long it took, in microseconds.
    """
    tag = _tag(command)
    is12 = tag in _SESSIONS12
    code = int.from_bytes(command_code(command), "big") if is12 or tag in _TAGS2 else None
    if code is None:
        is12 = _tag(response or b"") in _RESPONSE_SESSIONS12
    answer = None if response is None else _response(response, code, tpm12=is12)
    return Decoded(micros, duration, is12, _command(command, code, tpm12=is12), answer)


def _tag(data: bytes) -> int | None:
    return int.from_bytes(data[:2], "big") if _whole(data) else None


def _whole(data: bytes) -> bool:
    return len(data) >= TPM_HEADER_SIZE


def _size_faults(data: bytes) -> tuple[str, ...]:
    said = command_size(data)
    return () if said == len(data) else (f"the header says {said} bytes, {len(data)} came",)


# -- commands -------------------------------------------------------------------------------


def _command(data: bytes, code: int | None, *, tpm12: bool) -> Command:
    if code is None:
        fault = "the tag is none of a command" if _whole(data) else "too short for a command"
        return Command("?", len(data), faults=(fault,))
    found = Command(names.command_name(code, tpm12=tpm12), len(data), faults=_size_faults(data))
    shape = names.shape_of(code, tpm12=tpm12)
    reader = Reader(data[TPM_HEADER_SIZE:], "command")
    found = found._replace(parameters=reader.left)
    if code == TPM_CC_SET_LOCALITY:
        return found._replace(details=_details(_locality, reader.take(reader.left)))
    if shape is None:
        return _with_fault(found, "nobody knows this command")
    if reader.left < shape.handles * 4:
        return _with_fault(found, "it ends within its handles")
    handles = tuple(reader.number(4) for _ in range(shape.handles))
    found = found._replace(
        handles=tuple(names.handle_name(handle, tpm12=tpm12) for handle in handles),
        parameters=reader.left,
    )
    try:
        sessions = _sessions12(reader, data) if tpm12 else _sessions2(reader, data)
    except WireError:
        return _with_fault(found, "its authorization area does not fit")
    parameters = reader.take(reader.left - (_AUTHORIZATION_SIZE12 * len(sessions) if tpm12 else 0))
    about = _DETAILS12.get(code) if tpm12 else _DETAILS.get(code)
    return found._replace(
        sessions=sessions,
        parameters=len(parameters),
        details=_details(about, parameters) if about else (),
    )


def _with_fault(found: Command, fault: str) -> Command:
    return found._replace(faults=(*found.faults, fault))


def _sessions2(reader: Reader, data: bytes) -> tuple[Session, ...]:
    """Takes the authorization area. Raises WireError."""
    if _tag(data) != TpmTag.TPM_ST_SESSIONS:
        return ()
    area = Reader(reader.take(reader.number(4)), "authorization area")
    found = []
    while area.left:
        entry = tpm2.PasswordSession.read(area)
        handle = entry.sessionHandle
        # Any other number there could be anything, a part of a password among it.
        name = names.handle_name(handle) if names.is_session(handle) else "no session"
        found.append(Session(name, names.attribute_names(entry.sessionAttributes)))
    return tuple(found)


def _sessions12(reader: Reader, data: bytes) -> tuple[Session, ...]:
    """Looks at the authorizations that the command ends with. Raises WireError.

    Where the end is in doubt nothing is shown: it might be a part of a password.
    """
    count = _SESSIONS12.get(_tag(data) or 0, 0)
    size = count * _AUTHORIZATION_SIZE12
    if count and (reader.left < size or command_size(data) != len(data)):
        raise WireError("authorizations", size, reader.left)
    ends = Reader(data[len(data) - size :], "authorizations")
    found = [tpm12.Authorization1.read(ends) for _ in range(count)]
    return tuple(
        Session(
            names.hexadecimal(entry.authHandle),
            ("continueAuthSession",) if entry.continueAuthSession else (),
        )
        for entry in found
    )


# -- what a command is about ----------------------------------------------------------------


def _details(about: Callable[[bytes], Details], parameters: bytes) -> Details:
    """What *about* reads in them; nothing where they are not what they should be."""
    try:
        return about(parameters)
    except WireError:
        return ()


def _capability(parameters: bytes) -> Details:
    asked = tpm2.GetCapabilityParameters.unpack_untrusted(parameters)
    return (
        ("capability", names.capability_name(asked.capability)),
        ("property", names.property_name(asked.capability, asked.property)),
        ("count", str(asked.propertyCount)),
    )


def _pcrs(parameters: bytes) -> Details:
    chosen = tpm2.PcrReadParameters.unpack_untrusted(parameters).pcrSelectionIn
    banks = (f"{names.bank_name(bank.hash)}:{_bits(bank.select)}" for bank in chosen)
    return (("PCRs", "+".join(banks)),)


def _bits(select: bytes) -> str:
    bits = int.from_bytes(select, "little")
    return ",".join(str(bit) for bit in range(8 * len(select)) if bits >> bit & 1)


def _flushed(parameters: bytes) -> Details:
    return (("handle", names.handle_name(_number(parameters, 4))),)


def _defined(parameters: bytes) -> Details:
    public = tpm2.NvDefineParameters.unpack_untrusted(parameters).publicInfo
    index = tpm2.NvPublic.unpack_untrusted(public).nvIndex
    return (("index", names.hexadecimal(index)),)


def _startup(parameters: bytes) -> Details:
    return _one_of({0: "TPM_SU_CLEAR", 1: "TPM_SU_STATE"}, _number(parameters, 2))


def _startup12(parameters: bytes) -> Details:
    kinds = {1: "TPM_ST_CLEAR", 2: "TPM_ST_STATE", 3: "TPM_ST_DEACTIVATED"}
    return _one_of(kinds, _number(parameters, 2))


def _one_of(kinds: dict[int, str], kind: int) -> Details:
    return (("type", kinds.get(kind, f"0x{kind:04x}")),)


def _locality(parameters: bytes) -> Details:
    return (("locality", str(_number(parameters, 1))),)


def _capability12(parameters: bytes) -> Details:
    area = tpm12.GetCapabilityParameters.unpack_untrusted(parameters).capArea
    return (("capability", names.capability_name(area, tpm12=True)),)


def _pcr12(parameters: bytes) -> Details:
    return (("PCR", str(Reader(parameters, "PCR").number(4))),)


def _index12(parameters: bytes) -> Details:
    return (("index", names.hexadecimal(Reader(parameters, "index").number(4))),)


def _defined12(parameters: bytes) -> Details:
    index = tpm12.NvDefineParameters.unpack_untrusted(parameters).nvIndex
    return (("index", names.hexadecimal(index)),)


def _number(parameters: bytes, size: int) -> int:
    """The only parameter. Raises WireError where there is less or more."""
    reader = Reader(parameters, "parameter")
    found = reader.number(size)
    reader.end()
    return found


_DETAILS: Final[dict[int, Callable[[bytes], Details]]] = {
    TpmCc.TPM_CC_GetCapability: _capability,
    TpmCc.TPM_CC_PCR_Read: _pcrs,
    TpmCc.TPM_CC_FlushContext: _flushed,
    TpmCc.TPM_CC_EvictControl: _flushed,
    TpmCc.TPM_CC_NV_DefineSpace: _defined,
    TpmCc.TPM_CC_Startup: _startup,
    TpmCc.TPM_CC_Shutdown: _startup,
}
_DETAILS12: Final[dict[int, Callable[[bytes], Details]]] = {
    TpmOrdinal.TPM_ORD_GetCapability: _capability12,
    TpmOrdinal.TPM_ORD_PcrRead: _pcr12,
    TpmOrdinal.TPM_ORD_Extend: _pcr12,
    TpmOrdinal.TPM_ORD_NV_DefineSpace: _defined12,
    TpmOrdinal.TPM_ORD_NV_WriteValue: _index12,
    TpmOrdinal.TPM_ORD_NV_WriteValueAuth: _index12,
    TpmOrdinal.TPM_ORD_NV_ReadValue: _index12,
    TpmOrdinal.TPM_ORD_NV_ReadValueAuth: _index12,
    TpmOrdinal.TPM_ORD_Startup: _startup12,
}


# -- responses ------------------------------------------------------------------------------


def _response(data: bytes, code: int | None, *, tpm12: bool) -> Response:
    tag = _tag(data)
    if tag is None:
        return Response(None, len(data), faults=("too short for a response",))
    if tag not in _RESPONSE_SESSIONS12 and tag not in _TAGS2:
        return Response(None, len(data), faults=("the tag is none of a response",))
    # A TPM of the other version answers in its own way.
    answers12 = tag in _RESPONSE_SESSIONS12
    result = explain(response_code(data), tpm12=answers12)
    reader = Reader(data[TPM_HEADER_SIZE:], "response")
    found = Response(result, len(data), parameters=reader.left, faults=_size_faults(data))
    if result.code:
        fault = ("it failed, and has more than a code",) if reader.left else ()
        return found._replace(faults=(*found.faults, *fault))
    shape = None if code is None else names.shape_of(code, tpm12=tpm12)
    if shape is None or answers12 != tpm12:
        return found
    try:
        if shape.returns_handle:
            handle = names.handle_name(reader.number(4), tpm12=tpm12)
            found = found._replace(handles=(handle,), parameters=reader.left)
        size, sessions = _sizes12(reader, tag) if tpm12 else _sizes2(reader, tag)
    except WireError:
        return found._replace(faults=(*found.faults, "handle and sessions do not fit"))
    return found._replace(parameters=size, sessions=sessions)


def _sizes2(reader: Reader, tag: int) -> tuple[int, int]:
    """Bytes of parameters, and how many sessions follow. Raises WireError."""
    if tag != TpmTag.TPM_ST_SESSIONS:
        return reader.left, 0
    size = reader.number(4)
    reader.take(size)
    sessions = 0
    while reader.left:  # TPMS_AUTH_RESPONSE: nonce, attributes, HMAC
        reader.take(reader.number(2))
        reader.take(1)
        reader.take(reader.number(2))
        sessions += 1
    return size, sessions


def _sizes12(reader: Reader, tag: int) -> tuple[int, int]:
    sessions = _RESPONSE_SESSIONS12.get(tag, 0)
    size = reader.left - sessions * _RESPONSE_AUTHORIZATION_SIZE12
    if size < 0:
        raise WireError("authorizations", sessions * _RESPONSE_AUTHORIZATION_SIZE12, reader.left)
    return size, sessions


# -- for people and programs ----------------------------------------------------------------


def text(record: Decoded) -> str:
    """A line, then indented ones about what went wrong, without a newline at the end."""
    command, response = record.command, record.response
    inside = (*command.handles, *(f"{name}={value}" for name, value in command.details))
    parts = [f"{command.name}({', '.join(inside)})"]
    parts += [_session_text(session) for session in command.sessions]
    parts.append(_sizes_text(command.parameters, command.size))
    line = ", ".join(parts)
    if record.micros is not None:
        line = f"{_time(record.micros)} {line}"
    more = [f"command: {fault}" for fault in command.faults]
    if response is None:
        return "\n    ".join([f"{line} -> no response", *more])
    parts = [_result_text(response.result), *response.handles]
    parts.append(_sizes_text(response.parameters, response.size))
    if record.duration is not None:
        parts.append(f"{record.duration / 1000:.3f} ms")
    if response.result and response.result.code:
        more.insert(0, response.result.words)
    more += [f"response: {fault}" for fault in response.faults]
    return "\n    ".join([f"{line} -> {', '.join(parts)}", *more])


def as_json(record: Decoded) -> dict[str, Any]:
    """The same, and the numbers, as what JSON can say.

    Any: values of JSON. Sizes in bytes, ``micros`` and ``duration`` in microseconds.
    """
    command, response = record.command, record.response
    return {
        "time": None if record.micros is None else _time(record.micros),
        "micros": record.micros,
        "duration": record.duration,
        "tpm": "1.2" if record.tpm12 else "2.0",
        "command": {
            **command._asdict(),
            "sessions": [session._asdict() for session in command.sessions],
            "details": dict(command.details),
        },
        "response": response
        and {**response._asdict(), "result": response.result and response.result._asdict()},
    }


def _session_text(session: Session) -> str:
    attributes = f" [{', '.join(session.attributes)}]" if session.attributes else ""
    kind = "" if "session" in session.handle else "session "
    return f"{kind}{session.handle}{attributes}"


def _sizes_text(parameters: int, size: int) -> str:
    return f"parameters {parameters} of {size} bytes" if parameters else f"{size} bytes"


def _result_text(result: Explained | None) -> str:
    if result is None:
        return "?"
    if result.code == 0:
        return result.name
    words = " ".join(filter(None, (result.name or "unknown", result.where)))
    return f"{words} (0x{result.code:x})"


def _time(micros: int) -> str:
    """ISO 8601, UTC; a capture may say anything, and what is no date is a number."""
    try:
        moment = _EPOCH + timedelta(microseconds=micros)
        return f"{moment.isoformat(timespec='microseconds')}Z"
    except OverflowError:
        return f"{micros} us"
