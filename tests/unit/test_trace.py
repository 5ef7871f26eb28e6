"""Commands and responses as people read them: what is shown, and what never is."""

from __future__ import annotations

import json
import os
import struct
from typing import TYPE_CHECKING, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support import commands as tpm
from tests.support.libtpms import BOTH, make, nv_commands, started
from tests.support.processes import in_child
from vtpm_cuse.config import PcapConfig
from vtpm_cuse.engine.recorded import RecordedTpm
from vtpm_cuse.wire import names, tpm2, tpm2_handles, tpm12
from vtpm_cuse.wire.pcapng import CaptureReader
from vtpm_cuse.wire.rc import explain
from vtpm_cuse.wire.tpm import TPM_CC_SET_LOCALITY, TpmCc, TpmOrdinal
from vtpm_cuse.wire.trace import Session, as_json, decode, text

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

PASSWORD: Final = bytes.fromhex("00000009 40000009 0000 00 0000")
HMAC_SESSION: Final = 0x02000001
POLICY_SESSION: Final = 0x03000002
SECRET: Final = b"\xa7"
SEEN: Final = ("a7a7", str(0xA7A7A7A7), str(0xA7A7), "\\u00a7", "\xa7")
"""What of a secret of such bytes could be seen, in text or JSON."""


def sized(data: bytes) -> bytes:
    return struct.pack(">H", len(data)) + data


def area(*sessions: tuple[int, int], secret: bytes = SECRET * 32) -> bytes:
    """An authorization area of handles with attributes."""
    entries = b"".join(
        struct.pack(">I", handle) + sized(secret) + bytes([attributes]) + sized(secret)
        for handle, attributes in sessions
    )
    return struct.pack(">I", len(entries)) + entries


def answer(body: bytes = b"", code: int = 0, tag: int = 0x8001) -> bytes:
    return struct.pack(">HII", tag, 10 + len(body), code) + body


def u32(*values: int) -> bytes:
    return struct.pack(f">{len(values)}I", *values)


# -- whole lines --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "response", "line"),
    [
        (
            tpm.get_random(8),
            answer(bytes(10)),
            "TPM2_GetRandom(), parameters 2 of 12 bytes -> TPM_RC_SUCCESS, parameters 10 of 20 bytes",
        ),
        (
            tpm.create_primary_rsa(),
            answer(u32(0x80000000, 100) + bytes(105), tag=0x8002),
            "TPM2_CreatePrimary(TPM_RH_OWNER), session TPM_RS_PW, parameters 36 of 63 bytes -> "
            "TPM_RC_SUCCESS, transient 0x80000000, parameters 100 of 123 bytes",
        ),
        (
            tpm.tpm2(
                0x15E,
                u32(0x81000001) + area((HMAC_SESSION, 0x61), (POLICY_SESSION, 0)),
                sessions=True,
            ),
            answer(code=0x99D),
            "TPM2_Unseal(persistent 0x81000001), "
            "HMAC session 0x02000001 [continueSession, decrypt, encrypt], "
            "policy session 0x03000002, 164 bytes -> "
            "TPM_RC_POLICY_FAIL session 1 (0x99d), 10 bytes\n"
            "    the policy that was carried out is not the one that is asked for",
        ),
        (
            tpm.pcr_extend(7, bytes(32)),
            None,
            "TPM2_PCR_Extend(PCR 7), session TPM_RS_PW, parameters 38 of 65 bytes -> no response",
        ),
        (
            tpm.tpm2(0x17E, u32(2) + bytes.fromhex("0004 03 010080 000b 03 000000")),
            answer(),
            "TPM2_PCR_Read(PCRs=sha1:0,23+sha256:), parameters 16 of 26 bytes -> "
            "TPM_RC_SUCCESS, 10 bytes",
        ),
        (
            tpm.tpm2(0x17A, u32(6, 0x105, 1)),
            answer(code=0xB0922),
            "TPM2_GetCapability(capability=TPM_CAP_TPM_PROPERTIES, property=TPM_PT_MANUFACTURER, "
            "count=1), parameters 12 of 22 bytes -> TPM_RC_RETRY (0xb0922), 10 bytes\n"
            "    a resource manager in the TPM's place: the TPM could not start the command: "
            "send it again",
        ),
        (
            tpm.tpm2(TPM_CC_SET_LOCALITY, b"\x03"),
            answer(),
            "TPM_CC_SET_LOCALITY(locality=3), parameters 1 of 11 bytes -> TPM_RC_SUCCESS, 10 bytes",
        ),
        (
            tpm.tpm12(0x0A),
            answer(u32(0x1234) + bytes(20), tag=0xC4),
            "TPM_OIAP(), 10 bytes -> TPM_SUCCESS, 0x00001234, parameters 20 of 34 bytes",
        ),
        (
            b"\0\xc2" + u32(10 + 4 + 20 + 45, 0x17, 0x40000000) + bytes(20)
            + u32(0x77) + SECRET * 20 + b"\1" + SECRET * 20,
            answer(bytes(41 + 7), tag=0xC5),
            "TPM_Seal(TPM_KH_SRK), session 0x00000077 [continueAuthSession], "
            "parameters 20 of 79 bytes -> TPM_SUCCESS, parameters 7 of 58 bytes",
        ),
        # what does not fit
        (b"", b"", "?(), 0 bytes -> ?, 0 bytes\n    command: too short for a command\n"
                   "    response: too short for a response"),
        (
            b"GET / HTTP/1.1",
            b"\x80\x03" + u32(10, 0),
            "?(), 14 bytes -> ?, 10 bytes\n    command: the tag is none of a command\n"
            "    response: the tag is none of a response",
        ),
        (
            tpm.tpm2(0x999, bytes(5)),
            answer(b"more", code=0x143),
            "0x00000999(), parameters 5 of 15 bytes -> TPM_RC_COMMAND_CODE (0x143), "
            "parameters 4 of 14 bytes\n    the TPM does not know this command\n"
            "    command: nobody knows this command\n"
            "    response: it failed, and has more than a code",
        ),
        (
            tpm.TPM2_STARTUP_CLEAR[:-1],
            answer(code=0x142) + b"x",
            "TPM2_Startup(), parameters 1 of 11 bytes -> TPM_RC_COMMAND_SIZE (0x142), "
            "parameters 1 of 11 bytes\n"
            "    the size in the command's header is not the command's size\n"
            "    command: the header says 12 bytes, 11 came\n"
            "    response: the header says 10 bytes, 11 came\n"
            "    response: it failed, and has more than a code",
        ),
        (
            tpm.tpm2(0x14E, u32(0x40000001)),
            None,
            "TPM2_NV_Read(), parameters 4 of 14 bytes -> no response\n"
            "    command: it ends within its handles",
        ),
        (
            tpm.tpm2(0x15E, u32(0x80000000, 99), sessions=True),
            answer(u32(99), tag=0x8002),
            "TPM2_Unseal(transient 0x80000000), parameters 4 of 18 bytes -> TPM_RC_SUCCESS, "
            "parameters 4 of 14 bytes\n    command: its authorization area does not fit\n"
            "    response: handle and sessions do not fit",
        ),
        # one version asks, the other answers
        (
            tpm.TPM12_SAVE_STATE,
            answer(code=0x84),
            "TPM_SaveState(), 10 bytes -> TPM_RC_VALUE (0x84), 10 bytes\n"
            "    the value is out of range or does not fit here",
        ),
        (
            tpm.TPM2_SHUTDOWN_STATE,
            answer(code=0x1E, tag=0xC4),
            "TPM2_Shutdown(type=TPM_SU_STATE), parameters 2 of 12 bytes -> "
            f"TPM_BADTAG (0x1e), 10 bytes\n    {explain(0x1E).words}",
        ),
    ],
)  # fmt: skip
def test_lines(command: bytes, response: bytes | None, line: str) -> None:
    assert text(decode(command, response)) == line


@pytest.mark.parametrize(
    ("command", "details"),
    [
        (tpm.TPM12_STARTUP_STATE, {"type": "TPM_ST_STATE"}),
        (tpm.tpm12_pcr_extend(7, SECRET * 20), {"PCR": "7"}),
        (tpm.tpm12_pcr_read(8), {"PCR": "8"}),
        (tpm.tpm12_nv_define(0x1101, 8), {"index": "0x00001101"}),
        (tpm.tpm12_nv_write(0x1101, SECRET * 8), {"index": "0x00001101"}),
        (tpm.tpm12_nv_read(0x1101, 8), {"index": "0x00001101"}),
        (tpm.tpm12(0x65, u32(5, 4, 0x103)), {"capability": "TPM_CAP_PROPERTY"}),
        (tpm.nv_define(tpm.NV_INDEX, 8), {"index": "0x01500017"}),
        (tpm.tpm2(0x165, u32(0x80000001)), {"handle": "transient 0x80000001"}),
        (tpm.tpm2(0x165, u32(0x80000001) + b"x"), {}),
        (tpm.tpm2(0x144, b"\0\5"), {"type": "0x0005"}),
        (
            tpm.tpm2(0x17A, u32(1, 0x40000000 | 0xA, 5)),
            {"capability": "TPM_CAP_HANDLES", "property": "TPM_RH_LOCKOUT", "count": "5"},
        ),
        (
            tpm.tpm2(0x17A, u32(2, 0x131, 1)),
            {"capability": "TPM_CAP_COMMANDS", "property": "TPM2_CreatePrimary", "count": "1"},
        ),
        (
            tpm.tpm2(0x17A, u32(77, 1, 1)),
            {"capability": "0x0000004d", "property": "0x00000001", "count": "1"},
        ),
    ],
)
def test_what_a_command_is_about(command: bytes, details: dict[str, str]) -> None:
    assert as_json(decode(command))["command"]["details"] == details


def test_time_is_said_as_a_date_and_as_a_number() -> None:
    record = decode(tpm.get_random(8), answer(), micros=1_700_000_000_000_001, duration=1234)
    line = text(record)
    assert line.startswith("2023-11-14T22:13:20.000001Z TPM2_GetRandom()")
    assert line.endswith(", 1.234 ms")
    said = as_json(record)
    assert (said["time"], said["micros"], said["duration"]) == (
        "2023-11-14T22:13:20.000001Z",
        1_700_000_000_000_001,
        1234,
    )
    assert text(decode(b"", micros=1 << 80)).startswith(f"{1 << 80} us ?()")


def test_json_has_everything() -> None:
    unseal = tpm.tpm2(0x15E, u32(0x80000000) + area((HMAC_SESSION, 1)), sessions=True)
    said = as_json(decode(unseal, answer(code=0x98E)))
    assert json.loads(json.dumps(said)) == {
        "time": None,
        "micros": None,
        "duration": None,
        "tpm": "2.0",
        "command": {
            "name": "TPM2_Unseal",
            "size": len(unseal),
            "handles": ["transient 0x80000000"],
            "sessions": [{"handle": "HMAC session 0x02000001", "attributes": ["continueSession"]}],
            "details": {},
            "parameters": 0,
            "faults": [],
        },
        "response": {
            "result": explain(0x98E)._asdict(),
            "size": 10,
            "handles": [],
            "sessions": 0,
            "parameters": 0,
            "faults": [],
        },
    }
    assert as_json(decode(tpm.TPM12_SAVE_STATE))["response"] is None
    assert as_json(decode(tpm.TPM12_SAVE_STATE))["tpm"] == "1.2"


# -- names --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("handle", "name"),
    [
        (0, "PCR 0"),
        (31, "PCR 31"),
        (32, "0x00000020"),
        (0x01C00002, "NV index 0x01c00002"),
        (0x40000007, "TPM_RH_NULL"),
        (0x40000010, "TPM_RH_AUTH_00"),
        (0x4000010F, "TPM_RH_AUTH_FF"),
        (0x4000011F, "TPM_RH_ACT_F"),
        (0x40000999, "0x40000999"),
        (0x80FFFFFF, "transient 0x80ffffff"),
        (0xFFFFFFFF, "0xffffffff"),
    ],
)
def test_handles(handle: int, name: str) -> None:
    assert names.handle_name(handle) == name


@pytest.mark.parametrize("module", [tpm2, tpm2_handles, tpm12])
def test_constants_of_the_package_are_called_the_same(module: ModuleType) -> None:
    of12 = module is tpm12
    naming: dict[str, Callable[[int], str]] = {
        "TPM_RH_": names.handle_name,
        "TPM_RS_": names.handle_name,
        "TPM_CAP_": lambda value: names.capability_name(value, tpm12=of12),
        "TPM_PT_": lambda value: names.property_name(6, value),
    }
    found = {
        constant: naming[prefix](value)
        for constant, value in vars(module).items()
        for prefix in naming
        if constant.startswith(prefix)
        and not constant.startswith(("TPM_CAP_PROP_", "TPM_CAP_FLAG_"))
    }
    assert found
    assert found == {constant: constant for constant in found}


@in_child
def test_every_command_of_libtpms_has_a_name_and_its_handles() -> None:
    said = started().process(tpm2_handles.get_capability(tpm2_handles.TPM_CAP_COMMANDS, 0, 254))
    commands = tpm2_handles.CapabilityList.of(said)
    assert commands is not None
    assert len(commands.words) > 100
    for word in commands.words:
        code, attributes = tpm2_handles.CommandAttributes.of(word)
        assert names.command_name(code).startswith("TPM2_"), hex(code)
        wanted = names.Shape(attributes.handles, attributes.returns_handle)
        assert names.shape_of(code) == wanted, names.command_name(code)


# -- a TPM --------------------------------------------------------------------------------


@BOTH
@in_child
def test_what_a_tpm_was_asked_is_understood(tpm2: bool) -> None:
    """From the capture that is written of it, to its last byte."""
    fd = os.memfd_create("capture")
    recorded = RecordedTpm(make(tpm2=tpm2), PcapConfig(fd=fd))
    recorded.start()
    asked = [tpm.TPM2_STARTUP_CLEAR if tpm2 else tpm.TPM12_STARTUP_CLEAR]
    asked += nv_commands(tpm2=tpm2)
    asked += [tpm.pcr_extend(3, bytes(32)), tpm.tpm2(0x99)] if tpm2 else [tpm.tpm12(0x0A)]
    answers = [recorded.process(command) for command in asked]
    recorded.stop()
    reader = CaptureReader()
    found = [*reader.feed(os.pread(fd, 1 << 20, 0)), *reader.end()]
    assert (reader.trouble, reader.packets) == ("", 2 * len(asked) + 6)
    assert [(one.command, one.response) for one in found] == [*zip(asked, answers, strict=True)]
    records = [decode(one.command, one.response) for one in found]
    assert [record.command.name.split("_")[0] for record in records[:-1]] == (
        ["TPM2"] * 5 if tpm2 else ["TPM"] * 4
    )
    assert [record.command.name for record in records][-1] == ("0x00000099" if tpm2 else "TPM_OIAP")
    assert [f for record in records[:-1] for f in record.command.faults] == []
    assert [f for record in records if record.response for f in record.response.faults] == []
    codes = [tpm.code_of(answer) for answer in answers]
    assert [r.response.result.code for r in records if r.response and r.response.result] == codes
    assert codes[:-1] == [0] * (len(asked) - 1)


# -- secrets ------------------------------------------------------------------------------

ABOUT: Final = (0x17A, 0x17E, 0x165, 0x120, 0x144, 0x145)
"""TPM 2.0 commands of whose parameters something is shown, which is no secret."""
ABOUT12: Final = (0x65, 0x14, 0x15, 0xCD, 0xCE, 0xCF, 0xD0, 0x99)
CODES: Final = st.sampled_from([code for code in TpmCc if code not in ABOUT] + [0x999])
ORDINALS: Final = st.sampled_from([code for code in TpmOrdinal if code not in ABOUT12] + [0x999])
SECRETS: Final = st.integers(0, 600).map(lambda size: SECRET * size)
SESSIONS: Final = st.lists(
    st.tuples(
        st.sampled_from([HMAC_SESSION, POLICY_SESSION, 0x40000009, 0xA7A7A7A7]), st.integers(0, 255)
    ),
    max_size=3,
)


def check_nothing_is_seen(command: bytes, response: bytes | None) -> None:
    record = decode(command, response, micros=1, duration=2)
    for output in (text(record), json.dumps(as_json(record))):
        assert not [form for form in SEEN if form in output.lower()], output


@given(CODES, SESSIONS, SECRETS, SECRETS, SECRETS, st.integers(0, 400))
def test_no_secret_of_a_tpm2_is_seen(
    code: int,
    sessions: list[tuple[int, int]],
    secret: bytes,
    parameters: bytes,
    reply: bytes,
    cut: int,
) -> None:
    """Whole, cut off anywhere, and with a size that is wrong."""
    shape = names.shape_of(code) or names.Shape(0)
    body = u32(*[0x80000000] * shape.handles)
    body += area(*sessions, secret=secret) if sessions else b""
    command = tpm.tpm2(code, body + parameters, sessions=bool(sessions))
    handle = u32(0x80000001) if shape.returns_handle else b""
    response = answer(handle + reply)
    if sessions:
        ends = (sized(secret) + b"\1" + sized(secret)) * len(sessions)
        response = answer(handle + u32(len(reply)) + reply + ends, tag=0x8002)
    check_nothing_is_seen(command, response)
    whole = max(10 + len(handle) + 4 * shape.handles, cut)
    check_nothing_is_seen(command[:whole], response[:whole])
    check_nothing_is_seen(command + SECRET * 9, response + SECRET * 9)


@given(ORDINALS, st.integers(0, 2), SECRETS, SECRETS, st.integers(10, 200))
def test_no_secret_of_a_tpm12_is_seen(
    code: int, count: int, parameters: bytes, reply: bytes, cut: int
) -> None:
    shape = names.shape_of(code, tpm12=True) or names.Shape(0)
    body = u32(*[0x40000000] * shape.handles) + parameters
    body += (u32(0x77) + SECRET * 20 + b"\1" + SECRET * 20) * count
    command = struct.pack(">HII", 0xC1 + count, 10 + len(body), code) + body
    body = (u32(0x78) if shape.returns_handle else b"") + reply
    response = answer(body + (SECRET * 20 + b"\1" + SECRET * 20) * count, tag=0xC4 + count)
    check_nothing_is_seen(command, response)
    whole = max(10 + 4 * shape.handles + 4, cut)
    check_nothing_is_seen(command[:whole], response[:whole])
    check_nothing_is_seen(command + SECRET * 9, response + SECRET * 9)


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        # The password of a new index, and the policy of it.
        (
            tpm.tpm2(
                0x12A,
                u32(0x40000001)
                + PASSWORD
                + sized(SECRET * 20)
                + sized(u32(0x01500017) + b"\0\x0b" + u32(4) + sized(SECRET * 32) + b"\0\x08"),
                sessions=True,
            ),
            {"index": "0x01500017"},
        ),
        (tpm.tpm12_nv_write(0x1101, SECRET * 40), {"index": "0x00001101"}),
        (tpm.tpm12_pcr_extend(4, SECRET * 20), {"PCR": "4"}),
    ],
)
def test_what_is_shown_of_parameters_is_all(command: bytes, shown: dict[str, str]) -> None:
    check_nothing_is_seen(command, answer(SECRET * 50))
    assert as_json(decode(command))["command"]["details"] == shown


def test_a_secret_where_a_session_should_be_is_not_seen() -> None:
    command = tpm.tpm2(0x15E, u32(0x80000000) + area((0xA7A7A7A7, 0)), sessions=True)
    assert decode(command).command.sessions == (Session("no session", ()),)


# -- nonsense -----------------------------------------------------------------------------

TAGS: Final = st.sampled_from([0x8001, 0x8002, 0xC1, 0xC2, 0xC3, 0xC4, 0xC5, 0xC6, 0x8003])
ANY: Final = st.binary(max_size=200) | st.builds(
    lambda tag, size, code, body: struct.pack(">HII", tag, size, code) + body,
    TAGS,
    st.integers(0, 250),
    st.sampled_from([*TpmCc, *TpmOrdinal, 0, 0x98E, 0xFFFFFFFF]),
    st.binary(max_size=150),
)


@given(ANY, st.none() | ANY, st.integers(0, 1 << 90), st.none() | st.integers(-5, 1 << 70))
def test_anything_is_described(
    command: bytes, response: bytes | None, micros: int, duration: int | None
) -> None:
    record = decode(command, response, micros=micros, duration=duration)
    assert text(record).isprintable() or "\n" in text(record)
    assert json.loads(json.dumps(as_json(record)))["command"]["size"] == len(command)
    assert record.command.parameters <= len(command)
    assert record.response is None or record.response.parameters <= len(response or b"")
