"""The list of exchanges: hand-written and generated, from one seed, for both TPM versions.

An exchange is one message and what comes back. Its name says where a difference is; names are
unique within a session. `MASKS` in masks.py says which bytes of an answer are random.
"""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final

from tests.support import commands as tpm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SEED: Final = 20240607


class Way(Enum):
    """How the message travels."""

    DATA = "data, on a connection that stays"
    DATA_END = "data, then the end of the stream; the answer is all that comes back"
    DATA_PARTS = "data in two reads of the server, then the end of the stream"
    CONTROL = "control, then the end of the stream; the answer is all that comes back"


@dataclass(frozen=True)
class Exchange:
    """One message.

    Attributes:
        send: The message, or what makes it from the session's answers so far, by name.
        cut: Where `Way.DATA_PARTS` cuts.
    """

    name: str
    way: Way
    send: bytes | Callable[[dict[str, bytes]], bytes]
    cut: int = 0


@dataclass(frozen=True)
class Session:
    """What one run of the server is asked, from its start to its end."""

    name: str
    tpm2: bool
    exchanges: tuple[Exchange, ...]
    flags: tuple[str, ...] = ()
    locality: tuple[str, ...] = ()
    migration_key: bool = False
    file_key: bool = False


def sessions() -> list[Session]:
    """All of them."""
    return [
        *(_data_session(tpm2=tpm2) for tpm2 in (True, False)),
        *(_control_session(tpm2=tpm2) for tpm2 in (True, False)),
        *(_framing_session(tpm2=tpm2) for tpm2 in (True, False)),
        *_life_sessions(),
        *_locality_sessions(),
        _seeds_session(),
        *_key_sessions(),
    ]


# -- control messages ---------------------------------------------------------------------

GET_CAPABILITY, INIT, SHUTDOWN, GET_ESTABLISHED, SET_LOCALITY = 1, 2, 3, 4, 5
HASH_START, HASH_DATA, HASH_END, CANCEL, STORE_VOLATILE = 6, 7, 8, 9, 0xA
RESET_ESTABLISHED, GET_BLOB, SET_BLOB, STOP, GET_CONFIG = 0xB, 0xC, 0xD, 0xE, 0xF
SET_DATAFD, SET_BUFFERSIZE, GET_INFO, LOCK_STORAGE = 0x10, 0x11, 0x12, 0x13
PERMANENT, VOLATILE, SAVESTATE = 1, 2, 3

_BODIES: Final = {
    GET_CAPABILITY: 0,
    INIT: 4,
    GET_ESTABLISHED: 0,
    SET_LOCALITY: 1,
    HASH_START: 0,
    HASH_DATA: 4,
    HASH_END: 0,
    CANCEL: 0,
    STORE_VOLATILE: 0,
    RESET_ESTABLISHED: 1,
    GET_BLOB: 12,
    SET_BLOB: 12,
    STOP: 0,
    GET_CONFIG: 0,
    SET_DATAFD: 0,
    SET_BUFFERSIZE: 4,
    GET_INFO: 16,
    LOCK_STORAGE: 4,
}
"""Control command to the bytes of body it must have."""


def ptm(command: int, body: bytes = b"") -> bytes:
    """A control message."""
    return struct.pack(">I", command) + body


def get_blob(kind: int, *, decrypted: bool = False, offset: int = 0) -> bytes:
    return ptm(GET_BLOB, struct.pack(">III", decrypted, kind, offset))


def set_blob(kind: int, blob: bytes, flags: int = 0) -> bytes:
    return ptm(SET_BLOB, struct.pack(">III", flags, kind, len(blob)) + blob)


def get_info(flags: int, offset: int = 0) -> bytes:
    return ptm(GET_INFO, struct.pack(">QII", flags, offset, 0))


def hash_data(data: bytes) -> bytes:
    return ptm(HASH_DATA, struct.pack(">I", len(data)) + data)


def prefixed(locality: int, command: bytes, announced: int | None = None) -> bytes:
    """A TPM 2 command with the send-command header."""
    length = len(command) if announced is None else announced
    return struct.pack(">IBI", 8, locality, length) + command


def vendor_set_locality(tag: int, body: bytes) -> bytes:
    return struct.pack(">HII", tag, 10 + len(body), 0x20001000) + body


# -- TPM 2.0 commands ---------------------------------------------------------------------

_PASSWORD: Final = bytes.fromhex("00000009400000090000000000")
_OWNER, _NULL, _ENDORSEMENT, _PLATFORM = 0x40000001, 0x40000007, 0x4000000B, 0x4000000C
_LOCKOUT: Final = 0x4000000A
_SHA1, _SHA256, _SHA384, _SHA512, _ALG_NULL = 0x04, 0x0B, 0x0C, 0x0D, 0x10
_ECC_PUBLIC: Final = bytes.fromhex(
    "0023000b00040072000000100018000b000300100000 0000".replace(" ", "")
)
_STORAGE_PUBLIC: Final = bytes.fromhex("0023000b00030072000000060080004300030010" + "00000000")


def _b(data: bytes) -> bytes:
    """A sized buffer."""
    return struct.pack(">H", len(data)) + data


def _auth(code: int, handles: bytes, parameters: bytes = b"", *, sessions: int = 1) -> bytes:
    """A command with password sessions; each is 9 bytes behind one common size."""
    area = _PASSWORD[4:] * sessions
    return tpm.tpm2(code, handles + struct.pack(">I", len(area)) + area + parameters, sessions=True)


def _primary(hierarchy: int, public: bytes) -> bytes:
    parameters = _b(bytes(4)) + _b(public) + _b(b"") + struct.pack(">I", 0)
    return _auth(0x131, struct.pack(">I", hierarchy), parameters)


def _capability(what: int, first: int, count: int) -> bytes:
    return tpm.tpm2(0x17A, struct.pack(">III", what, first, count))


def _pcr_selection(algorithm: int, *pcrs: int) -> bytes:
    bits = sum(1 << pcr for pcr in pcrs) & 0xFFFFFF
    return struct.pack(">IHB", 1, algorithm, 3) + bits.to_bytes(3, "little")


def _start_session(kind: int) -> bytes:
    """An unbound, unsalted session without parameter encryption: 0 HMAC, 1 policy, 3 trial."""
    body = struct.pack(">II", _NULL, _NULL) + _b(bytes(16)) + _b(b"")
    return tpm.tpm2(0x176, body + struct.pack(">BHH", kind, _ALG_NULL, _SHA256))


_NV: Final = 0x01500020
_POLICY: Final = 0x03000000
_HMAC_SESSION: Final = 0x02000000
_OBJECT: Final = 0x80000000


def _u32(*values: int) -> bytes:
    return struct.pack(f">{len(values)}I", *values)


def _nv_attributes(index: int, attributes: int, size: int) -> bytes:
    public = struct.pack(">IHIHH", index, _SHA256, attributes, 0, size)
    return _auth(0x12A, _u32(_OWNER), _b(b"") + _b(public))


def _tpm2_story() -> list[tuple[str, bytes]]:
    """A session with something of everything, whose answers do not depend on chance but by masks."""
    story = [
        ("before startup", tpm.get_random(8)),
        ("self test before startup", tpm.tpm2(0x143, b"\1")),
        ("startup state without state", tpm.TPM2_STARTUP_STATE),
        ("startup", tpm.TPM2_STARTUP_CLEAR),
        ("startup again", tpm.TPM2_STARTUP_CLEAR),
        ("self test", tpm.tpm2(0x143, b"\1")),
        ("self test, rest", tpm.tpm2(0x143, b"\0")),
        ("incremental self test", tpm.tpm2(0x142, struct.pack(">IH", 1, _SHA256))),
        ("test result", tpm.tpm2(0x17C)),
        ("read clock", tpm.TPM2_READ_CLOCK),
        ("clock rate", _auth(0x130, _u32(_OWNER), b"\0")),
        ("stir random", tpm.tpm2(0x146, _b(b"stir"))),
    ]
    story += [(f"random {n}", tpm.get_random(n)) for n in (0, 1, 8, 32, 48, 64, 65, 1000, 65535)]
    for what, first, count in (
        *((0, n, 100) for n in (0, 1, 8, 0x100)),
        *((1, n, 20) for n in (0, 1, 0x02000000, 0x03000000, 0x40000000, 0x80000000, 0x81000000)),
        *((2, n, 300) for n in (0, 0x11F, 0x150, 0x20000000)),
        *((3, 0, 100), (4, 0, 100), (5, 0, 10), (7, 0, 100), (8, 0, 100), (9, 0, 10), (10, 0, 4)),
        *((6, n, 128) for n in (0x100, 0x110, 0x11E, 0x120, 0x200, 0x210, 0x300)),
        *((0x100, 0, 10), (11, 0, 10), (0xFFFFFFFF, 0, 10), (6, 0x100, 0), (6, 0x100, 1)),
    ):
        story.append(
            (f"capability {what:x} from {first:x}, {count}", _capability(what, first, count))
        )
    for pcr in (0, 10, 16, 17, 22, 23, 24):
        story += [
            (f"extend pcr {pcr}", tpm.pcr_extend(pcr, bytes([pcr]) * 32)),
            (f"read pcr {pcr}", tpm.tpm2(0x17E, _pcr_selection(_SHA256, pcr))),
            (f"reset pcr {pcr}", _auth(0x13D, _u32(pcr))),
            (f"event pcr {pcr}", _auth(0x13C, _u32(pcr), _b(b"event"))),
        ]
    for algorithm in (_SHA1, _SHA256, _SHA384, _SHA512, 0x12, 0xFFFF):
        story += [
            (f"read bank {algorithm:x}", tpm.tpm2(0x17E, _pcr_selection(algorithm, 0, 1, 2, 10))),
            (
                f"hash {algorithm:x}",
                tpm.tpm2(0x17D, _b(b"abc") + struct.pack(">HI", algorithm, _OWNER)),
            ),
            (f"hash start {algorithm:x}", tpm.tpm2(0x186, _b(b"") + struct.pack(">H", algorithm))),
            (f"flush sequence {algorithm:x}", tpm.tpm2(0x165, _u32(_OBJECT))),
        ]
    story += [
        ("sequence", tpm.tpm2(0x186, _b(b"") + struct.pack(">H", _SHA256))),
        ("sequence update", _auth(0x15C, _u32(_OBJECT), _b(b"part"))),
        ("sequence end", _auth(0x13E, _u32(_OBJECT), _b(b"rest") + _u32(_OWNER))),
        ("sequence gone", _auth(0x15C, _u32(_OBJECT), _b(b"part"))),
        ("primary storage", _primary(_OWNER, _STORAGE_PUBLIC)),
        ("read public", tpm.tpm2(0x173, _u32(_OBJECT))),
        ("create", _auth(0x153, _u32(_OBJECT), _b(bytes(4)) + _b(_ECC_PUBLIC) + _b(b"") + _u32(0))),
        ("evict", _auth(0x120, _u32(_OWNER, _OBJECT), _u32(0x81000001))),
        ("evict again", _auth(0x120, _u32(_OWNER, _OBJECT), _u32(0x81000001))),
        ("read persistent", tpm.tpm2(0x173, _u32(0x81000001))),
        ("evict out", _auth(0x120, _u32(_OWNER, 0x81000001), _u32(0x81000001))),
        ("context save", tpm.tpm2(0x162, _u32(_OBJECT))),
        ("context load rubbish", tpm.tpm2(0x161, bytes(40))),
        ("flush", tpm.tpm2(0x165, _u32(_OBJECT))),
        ("flush again", tpm.tpm2(0x165, _u32(_OBJECT))),
        ("primary signing", _primary(_OWNER, _ECC_PUBLIC)),
        (
            "quote",
            _auth(
                0x158,
                _u32(_OBJECT),
                _b(b"q") + struct.pack(">HH", 0x18, _SHA256) + _pcr_selection(_SHA256, 0),
            ),
        ),
        (
            "sign",
            _auth(
                0x15D,
                _u32(_OBJECT),
                _b(b"\1" * 32)
                + struct.pack(">HH", 0x18, _SHA256)
                + struct.pack(">HIH", 0x8024, _NULL, 0),
            ),
        ),
        (
            "get time",
            _auth(
                0x14C, _u32(_ENDORSEMENT, _OBJECT), _b(b"") + struct.pack(">H", 0x10), sessions=2
            ),
        ),
        ("ecc parameters", tpm.tpm2(0x178, struct.pack(">H", 3))),
        ("test parameters", tpm.tpm2(0x18A, bytes.fromhex("0001008000430800001400000000"))),
        ("flush signing", tpm.tpm2(0x165, _u32(_OBJECT))),
        ("primary rsa", tpm.create_primary_rsa()),
        ("flush rsa", tpm.tpm2(0x165, _u32(_OBJECT))),
        ("primary endorsement", _primary(_ENDORSEMENT, _STORAGE_PUBLIC)),
        ("flush endorsement", tpm.tpm2(0x165, _u32(_OBJECT))),
        ("primary null", _primary(_NULL, _STORAGE_PUBLIC)),
        ("flush null", tpm.tpm2(0x165, _u32(_OBJECT))),
        ("nv define", tpm.nv_define(_NV, 32)),
        ("nv define again", tpm.nv_define(_NV, 32)),
        ("nv read before write", tpm.nv_read(_NV, 32)),
        ("nv write", tpm.nv_write(_NV, b"0123456789abcdef" * 2)),
        ("nv read", tpm.nv_read(_NV, 32)),
        ("nv read past the end", tpm.nv_read(_NV, 33)),
        ("nv read public", tpm.tpm2(0x169, _u32(_NV))),
        ("nv write lock", _auth(0x138, _u32(_OWNER, _NV))),
        ("nv undefine", _auth(0x122, _u32(_OWNER, _NV))),
        ("nv counter", _nv_attributes(_NV + 1, 0x00020012, 8)),
        ("nv increment", _auth(0x134, _u32(_OWNER, _NV + 1))),
        ("nv increment again", _auth(0x134, _u32(_OWNER, _NV + 1))),
        ("nv counter read", tpm.nv_read(_NV + 1, 8)),
        ("nv bits", _nv_attributes(_NV + 2, 0x00020022, 8)),
        ("nv set bits", _auth(0x135, _u32(_OWNER, _NV + 2), struct.pack(">Q", 5))),
        ("nv extendable", _nv_attributes(_NV + 3, 0x00020042, 32)),
        ("nv extend", _auth(0x136, _u32(_OWNER, _NV + 3), _b(b"measured"))),
        ("nv extended", tpm.nv_read(_NV + 3, 32)),
        ("nv of silly size", _nv_attributes(_NV + 4, 0x00020002, 60000)),
        ("trial policy", _start_session(3)),
        ("policy pcr", tpm.tpm2(0x17F, _u32(_POLICY) + _b(b"") + _pcr_selection(_SHA256, 0))),
        ("policy command code", tpm.tpm2(0x16C, _u32(_POLICY, 0x153))),
        ("policy auth value", tpm.tpm2(0x16B, _u32(_POLICY))),
        ("policy locality", tpm.tpm2(0x16F, _u32(_POLICY) + b"\1")),
        ("policy or", tpm.tpm2(0x171, _u32(_POLICY, 2) + _b(bytes(32)) + _b(b"\1" * 32))),
        ("policy digest", tpm.tpm2(0x189, _u32(_POLICY))),
        ("policy restart", tpm.tpm2(0x180, _u32(_POLICY))),
        ("policy digest after restart", tpm.tpm2(0x189, _u32(_POLICY))),
        ("flush policy", tpm.tpm2(0x165, _u32(_POLICY))),
        ("hmac session", _start_session(0)),
        ("flush hmac session", tpm.tpm2(0x165, _u32(_HMAC_SESSION))),
        ("loaded session of a bad kind", _start_session(2)),
        ("dictionary attack reset", _auth(0x139, _u32(_LOCKOUT))),
        ("dictionary attack parameters", _auth(0x13A, _u32(_LOCKOUT), _u32(10, 20, 30))),
        ("set owner password", _auth(0x129, _u32(_OWNER), _b(b"secret"))),
        ("owner without password", _nv_attributes(_NV + 5, 0x00020002, 8)),
        ("set lockout password", _auth(0x129, _u32(_LOCKOUT), _b(b"secret"))),
        ("lockout without password", _auth(0x139, _u32(_LOCKOUT))),
        ("hierarchy off", _auth(0x121, _u32(_PLATFORM), struct.pack(">IB", _ENDORSEMENT, 0))),
        ("hierarchy off, used", _primary(_ENDORSEMENT, _STORAGE_PUBLIC)),
        ("hierarchy on", _auth(0x121, _u32(_PLATFORM), struct.pack(">IB", _ENDORSEMENT, 1))),
        ("shutdown state", tpm.TPM2_SHUTDOWN_STATE),
        ("random after shutdown", tpm.get_random(4)),
        ("shutdown clear", tpm.TPM2_SHUTDOWN_CLEAR),
        ("shutdown of a bad kind", tpm.tpm2(0x145, b"\0\2")),
    ]
    return story


def _tpm2_last_story() -> list[tuple[str, bytes]]:
    """What gives the TPM new secrets; later answers depend on them."""
    return [
        ("startup", tpm.TPM2_STARTUP_CLEAR),
        ("set owner password", _auth(0x129, _u32(_OWNER), _b(b"secret"))),
        ("clear by platform", _auth(0x126, _u32(_PLATFORM))),
        ("owner after clear", _nv_attributes(_NV + 5, 0x00020002, 8)),
        ("new endorsement seed", _auth(0x124, _u32(_PLATFORM))),
        ("new platform seed", _auth(0x125, _u32(_PLATFORM))),
        ("shutdown", tpm.TPM2_SHUTDOWN_STATE),
        ("random after shutdown", tpm.get_random(4)),
    ]


_NOT_CHANGED: Final = frozenset({0x11F, 0x124, 0x125, 0x126, 0x131, 0x153, 0x191, 0x197, 0x144})
"""TPM 2 commands that generated ones leave alone: those that make new seeds, and the slow ones."""


# -- TPM 1.2 commands ---------------------------------------------------------------------


def _tpm12_story() -> list[tuple[str, bytes]]:
    def capability(area: int, sub: bytes = b"") -> bytes:
        return tpm.tpm12(0x65, _u32(area, len(sub)) + sub)

    story = [
        ("before startup", tpm.tpm12_pcr_read(0)),
        ("startup", tpm.TPM12_STARTUP_CLEAR),
        ("startup again", tpm.TPM12_STARTUP_CLEAR),
        ("continue self test", tpm.TPM12_CONTINUE_SELF_TEST),
        ("self test", tpm.tpm12(0x50)),
        ("test result", tpm.tpm12(0x54)),
        ("presence enable", tpm.TPM12_PHYSICAL_PRESENCE_CMD_ENABLE),
        ("presence", tpm.TPM12_PHYSICAL_PRESENCE_PRESENT),
        ("enable", tpm.tpm12(0x6F)),
        ("activate", tpm.tpm12(0x72, b"\0")),
        ("owner install", tpm.tpm12(0x71, b"\1")),
        ("read pubek", tpm.tpm12(0x7C, bytes(20))),
        ("sha1 start", tpm.tpm12(0xA0)),
        ("sha1 update", tpm.tpm12(0xA1, _u32(64) + bytes(64))),
        ("sha1 complete", tpm.tpm12(0xA2, _u32(3) + b"abc")),
        ("sha1 without start", tpm.tpm12(0xA2, _u32(3) + b"abc")),
        ("sha1 extend", tpm.tpm12(0xA3, _u32(10, 3) + b"abc")),
        ("stir random", tpm.tpm12(0x47, _u32(4) + b"stir")),
        ("ticks", tpm.tpm12(0xF1)),
        ("oiap", tpm.tpm12(0x0A)),
        ("oiap again", tpm.tpm12(0x0A)),
        ("capability version value", capability(0x1A)),
        ("nv define", tpm.tpm12_nv_define(0x1101, 16)),
        ("nv define again", tpm.tpm12_nv_define(0x1101, 16)),
        ("nv write", tpm.tpm12_nv_write(0x1101, b"0123456789abcdef")),
        ("nv read", tpm.tpm12_nv_read(0x1101, 16)),
        ("nv read past the end", tpm.tpm12_nv_read(0x1101, 17)),
        ("nv read of none", tpm.tpm12_nv_read(0x1102, 16)),
        ("locality high", tpm.tpm12_pcr_extend(17, bytes(20))),
        ("disable", tpm.tpm12(0x70)),
        ("random while disabled", tpm.tpm12(0x46, _u32(8))),
        ("enable again", tpm.tpm12(0x6F)),
        ("force clear", tpm.tpm12(0x5D)),
    ]
    story += [(f"random {n}", tpm.tpm12(0x46, _u32(n))) for n in (0, 1, 20, 128, 4000, 1 << 31)]
    for pcr in (0, 10, 16, 17, 23, 24, 0xFFFFFFFF):
        story += [
            (f"extend pcr {pcr}", tpm.tpm12_pcr_extend(pcr, bytes(range(20)))),
            (f"read pcr {pcr}", tpm.tpm12_pcr_read(pcr)),
            (
                f"reset pcr {pcr}",
                tpm.tpm12(0xC8, struct.pack(">H", 3) + (1 << pcr % 24).to_bytes(3, "little")),
            ),
        ]
    for area in (*range(0x18), 0x1A, 0xFF):
        for sub in (b"", _u32(0), _u32(0x101), _u32(0x103), _u32(0x108), _u32(0x10F), _u32(0x11B)):
            story.append((f"capability {area:x}, {sub.hex() or 'none'}", capability(area, sub)))
    story += [
        ("save state", tpm.TPM12_SAVE_STATE),
        ("read after save state", tpm.tpm12_pcr_read(10)),
        ("startup state", tpm.TPM12_STARTUP_STATE),
    ]
    return story


_NOT_CHANGED_12: Final = frozenset({0x0D, 0x1F, 0x78, 0x79, 0x7F, 0x99})


# -- generated ----------------------------------------------------------------------------


def _changed(rng: random.Random, command: bytes) -> bytes:
    """The command with some of its body changed; header and its size fit."""
    body = bytearray(command[10:])
    for _ in range(rng.randint(1, 3)):
        match rng.randrange(5):
            case 0 if body:
                body[rng.randrange(len(body))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
            case 1 if body:
                body[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
            case 2 if body:
                del body[rng.randrange(len(body)) :]
            case 3:
                body += rng.randbytes(rng.choice((1, 2, 4, 50)))
            case _ if body:
                place = rng.randrange(len(body))
                body[place:place] = rng.randbytes(rng.randint(1, 4))
    return command[:2] + struct.pack(">I", 10 + len(body)) + command[6:10] + bytes(body)


def _random_command(rng: random.Random, *, tpm2: bool) -> bytes:
    """A header that fits a random body."""
    excluded = _NOT_CHANGED if tpm2 else _NOT_CHANGED_12
    if tpm2:
        tag = rng.choice((0x8001, 0x8002, 0x8001, 0x8002, 0xC1, 0x8003, 0))
        code = rng.randrange(0x11D, 0x1A0) if rng.random() < 0.9 else rng.getrandbits(32)
    else:
        tag = rng.choice((0xC1, 0xC1, 0xC2, 0xC3, 0xC4, 0x8001, 0))
        code = rng.randrange(0x100) if rng.random() < 0.9 else rng.getrandbits(32)
    if code in excluded:
        code = 0x17B if tpm2 else 0x46
    body = rng.choice((b"", _u32(_OWNER), _u32(_OBJECT), _u32(0))) + rng.choice((b"", _PASSWORD))
    body += rng.randbytes(rng.choice((0, 1, 2, 4, 8, 20, 100)))
    return struct.pack(">HII", tag, 10 + len(body), code) + body


def _data_session(*, tpm2: bool) -> Session:
    """The story, then changed and random commands."""
    rng = random.Random(SEED + tpm2)  # noqa: S311 - not for secrets
    story = _tpm2_story() if tpm2 else _tpm12_story()
    excluded = _NOT_CHANGED if tpm2 else _NOT_CHANGED_12
    templates = [
        command for _, command in story if int.from_bytes(command[6:10], "big") not in excluded
    ]
    found = [Exchange("init", Way.CONTROL, ptm(INIT, bytes(4)))]
    found += [Exchange(name, Way.DATA, command) for name, command in story]
    restart = tpm.TPM2_STARTUP_CLEAR if tpm2 else tpm.TPM12_STARTUP_CLEAR
    for number in range(2400 if tpm2 else 1600):
        if (
            number % (100 if tpm2 else 200) == 0
        ):  # what was done to it, or a failure mode, does not last
            found += [
                Exchange(f"reset {number}", Way.CONTROL, ptm(INIT, bytes(4))),
                Exchange(f"startup {number}", Way.DATA, restart),
            ]
        if rng.random() < 0.6:
            command = _changed(rng, rng.choice(templates))
        else:
            command = _random_command(rng, tpm2=tpm2)
        found.append(Exchange(f"generated {number}: {command[:40].hex()}", Way.DATA, command))
    return Session(f"data {_version(tpm2=tpm2)}", tpm2, tuple(found))


def _control_session(*, tpm2: bool) -> Session:
    """Control messages good and bad, in every state, with commands between them."""
    rng = random.Random(SEED + 10 + tpm2)  # noqa: S311 - not for secrets
    startup = tpm.TPM2_STARTUP_CLEAR if tpm2 else tpm.TPM12_STARTUP_CLEAR
    read = tpm.pcr_read(17) if tpm2 else tpm.tpm12_pcr_read(17)
    found: list[Exchange] = []

    def add(name: str, message: bytes, way: Way = Way.CONTROL) -> None:
        found.append(Exchange(f"{name} ({len(found)})", way, message))

    for state in ("stopped", "initialised", "started"):
        if state == "initialised":
            add("init", ptm(INIT, bytes(4)))
        if state == "started":
            add("startup", startup, Way.DATA)
        for command, size in _BODIES.items():
            if command in {INIT, STOP, SET_DATAFD}:
                continue
            for body in (b"", *(bytes(n) for n in {1, 4, 8, 12, 16, size} - {0})):
                if command == SET_BLOB and size <= len(body):
                    continue  # empty permanent states end the C suite's process
                if command == HASH_DATA and size < len(body):
                    continue  # more than announced: below
                add(f"{state}: {command:x} with {len(body)} bytes", ptm(command, body))
        for locality in (0, 1, 3, 4, 5, 255):
            for command in (SET_LOCALITY, RESET_ESTABLISHED):
                add(f"{state}: {command:x} of locality {locality}", ptm(command, bytes([locality])))
            add(f"{state}: command there", read, Way.DATA)
        add(f"{state}: locality 0", ptm(SET_LOCALITY, b"\0"))
        for flags in (*(1 << n for n in range(9)), 0xFF, 1 << 31, 1 << 32, (1 << 64) - 1):
            add(f"{state}: info {flags:x}", get_info(flags))
        for offset in (1, 100, 3071, 3072, 4000, 1 << 20, 0xFFFFFFFF):
            add(f"{state}: info at {offset}", get_info(0xDF, offset))
        for kind in (0, PERMANENT, VOLATILE, SAVESTATE, 4, 0xFFFFFFFF):
            for offset in (0, 1, 100, 1 << 20):
                add(f"{state}: blob {kind:x} at {offset}", get_blob(kind, offset=offset))
            add(f"{state}: take rubbish for {kind:x}", set_blob(kind, b"rubbish"))
        for size in (0, 1, 0xAF8, 0xC00, 4096, 4097, 0xFFFFFFFF):
            add(f"{state}: buffer size {size}", ptm(SET_BUFFERSIZE, _u32(size)))
        for text in (b"", b"a", b"a" * 4092, b"a" * 4096, b"a" * 4097, b"a" * 20000):
            if len(text) > 4096 and (state == "stopped" or not (tpm2 or state == "started")):
                continue  # refused: below
            add(f"{state}: hash start", ptm(HASH_START))
            add(f"{state}: hash {len(text)}", hash_data(text))
            add(f"{state}: hash end", ptm(HASH_END))
            add(f"{state}: hashed", read, Way.DATA)
        add(f"{state}: stop and back", ptm(STOP if state == "stopped" else CANCEL))
        for count in (0, 1):
            add(f"{state}: lock {count}", ptm(LOCK_STORAGE, _u32(count)))
    for body in (b"", b"\0", bytes(5), bytes(8), _u32(1), _u32(2), _u32(0xFFFFFFFF)):
        add(f"init with {body.hex() or 'nothing'}", ptm(INIT, body))
        add("command", read, Way.DATA)
        add(f"stop with {body.hex() or 'nothing'}", ptm(STOP, body))
        add("command", read, Way.DATA)
    for number in (0, 0x14, 0x15, 0x100, 0x80000000, 0xFFFFFFFF):
        for body in (b"", bytes(4), bytes(100)):
            add(f"unknown {number:x} with {len(body)}", ptm(number, body))
    for cut in (b"", b"\0", b"\0\0", b"\0\0\0"):
        add(f"{len(cut)} bytes", cut)
    for number in range(700):
        add(f"generated {number}", _random_control(rng, tpm2=tpm2))
        if rng.random() < 0.2:
            add("startup", startup, Way.DATA)
            add("command", read, Way.DATA)
    add("command", read, Way.DATA)  # takes the lock back
    last = {
        "stop": ptm(STOP),
        "init": ptm(INIT, bytes(4)),
        "data descriptor after a client": ptm(SET_DATAFD),
        "hash more than announced": ptm(HASH_DATA, bytes(8)),
        "stop again": ptm(STOP),
        "hash much while off": hash_data(bytes(20000)),
    }
    found += [Exchange(f"last: {name}", Way.CONTROL, message) for name, message in last.items()]
    first = Exchange("first: data descriptor before any client", Way.CONTROL, ptm(SET_DATAFD))
    return Session(f"control {_version(tpm2=tpm2)}", tpm2, (first, *found))


def _random_control(rng: random.Random, *, tpm2: bool) -> bytes:
    command = rng.choice([*_BODIES, *[INIT] * tpm2, rng.getrandbits(32)])
    if command == SET_DATAFD:
        command = GET_CAPABILITY
    size = _BODIES.get(command, 0)
    match command:
        case 0xD:  # SET_BLOB
            return set_blob(rng.choice((0, 1, 2, 3, 4)), rng.randbytes(rng.randint(1, 200)))
        case 0x7:  # HASH_DATA
            return hash_data(rng.randbytes(rng.randint(0, 4000)))
        case 0xC:  # GET_BLOB
            return get_blob(
                rng.randrange(5), decrypted=rng.random() < 0.5, offset=rng.randrange(3000)
            )
        case 0x11:  # SET_BUFFERSIZE
            return ptm(
                SET_BUFFERSIZE, _u32(rng.choice((0, 0xAF8, 3000, 4096, rng.getrandbits(32))))
            )
        case 0x12:  # GET_INFO
            return get_info(rng.getrandbits(8), rng.choice((0, 0, rng.randrange(5000))))
    if rng.random() < 0.2:
        size = rng.randrange(20)
    return ptm(command, bytes(rng.choice((0, 1, 3)) for _ in range(size)))


def _framing_session(*, tpm2: bool) -> Session:
    """What a stream of bytes may look like."""
    good = tpm.pcr_read(0) if tpm2 else tpm.tpm12_pcr_read(0)
    name = _version(tpm2=tpm2)
    found: list[Exchange] = []

    def add(name: str, message: bytes, way: Way = Way.DATA, cut: int = 0) -> None:
        found.append(Exchange(name, way, message, cut))

    def sized(size: int, command: bytes = good) -> bytes:
        return command[:2] + struct.pack(">I", size) + command[6:]

    for state in ("off", "on"):
        if state == "on":
            add("init", ptm(INIT, bytes(4)), Way.CONTROL)
            add("startup", tpm.TPM2_STARTUP_CLEAR if tpm2 else tpm.TPM12_STARTUP_CLEAR)
        add(f"{state}: good", good)
        add(f"{state}: good, then the end", good, Way.DATA_END)
        add(f"{state}: nothing, then the end", b"", Way.DATA_END)
        for count in range(1, 10):
            add(f"{state}: {count} bytes, then the end", good[:count], Way.DATA_END)
        for count in range(10, len(good)):
            add(f"{state}: {count} bytes of more, then the end", good[:count], Way.DATA_END)
        for size in (0, 1, 9, 4097, 5000, 0x7FFFFFFF, 0xFFFFFFFF):
            add(f"{state}: size field {size}", sized(size))
        for size in (len(good) + 1, 100, 4096):
            add(f"{state}: size field {size}, then the end", sized(size), Way.DATA_END)
        for size in (10, len(good) - 1):
            add(f"{state}: surplus, size field {size}", sized(size), Way.DATA_END)
        add(f"{state}: two at once", good + good, Way.DATA_END)
        add(f"{state}: surplus byte", good + b"\0", Way.DATA_END)
        add(f"{state}: in two parts", good, Way.DATA_PARTS, 10)
        add(f"{state}: in two parts, the first short", good, Way.DATA_PARTS, 4)
        for size in (10, 11, 1000, 4095, 4096):
            add(
                f"{state}: rubbish of {size}",
                bytes(2) + struct.pack(">I", size) + b"\xff" * (size - 6),
            )
        add(
            f"{state}: largest",
            tpm.tpm2(0x17B, bytes(4086)) if tpm2 else tpm.tpm12(0x46, bytes(4086)),
        )
        for tag in (0xC1, 0xC2, 0xC3, 0xC4, 0x8001, 0x8002, 0x8003, 0, 0xFFFF):
            add(f"{state}: set locality by tag {tag:x}", vendor_set_locality(tag, b"\1"))
        for body in (b"", b"\0", b"\4", b"\5", b"\xff", bytes(4)):
            add(f"{state}: set locality {body.hex()}", vendor_set_locality(0x8001, body))
        for locality in (0, 1, 4, 5, 31, 32, 77, 255):
            # TPM 1.2 does not know the prefix, and takes its size field for a silly one.
            add(f"{state}: prefix of locality {locality}", prefixed(locality, good))
            add(f"{state}: unprefixed after {locality}", good)
        for announced in (0, 5, 0xFFFFFFFF):
            add(f"{state}: prefix announces {announced}", prefixed(0, good, announced))
        add(f"{state}: prefix alone, then the end", prefixed(0, b""), Way.DATA_END)
        add(f"{state}: prefix and 5 bytes, then the end", prefixed(0, good[:5]), Way.DATA_END)
        add(f"{state}: prefix of a bad command", prefixed(0, sized(5)))
        add(
            f"{state}: another message of the simulator",
            struct.pack(">IBI", 9, 0, 20) + good,
            Way.DATA_END,
        )
    return Session(f"framing {name}", tpm2, tuple(found))


def _seeds_session() -> Session:
    story = [Exchange(name, Way.DATA, command) for name, command in _tpm2_last_story()]
    return Session("new seeds", True, (Exchange("init", Way.CONTROL, ptm(INIT, bytes(4))), *story))


def _locality_sessions() -> Iterator[Session]:
    """The vendor command where it is allowed, and locality 4 where it is not."""
    for tpm2 in (True, False):
        read = tpm.pcr_read(17) if tpm2 else tpm.tpm12_pcr_read(17)
        extend = tpm.pcr_extend(17, bytes(32)) if tpm2 else tpm.tpm12_pcr_extend(17, bytes(20))
        found = []
        for body in (b"", b"\0", b"\1", b"\3", b"\4", b"\5", b"\xff", b"\2\0\0\0"):
            command = vendor_set_locality(0x8001 if tpm2 else 0xC1, body)
            found.append(Exchange(f"by command: {body.hex()}", Way.DATA, command))
            found.append(Exchange(f"extend after {body.hex()}", Way.DATA, extend))
            found.append(Exchange(f"read after {body.hex()}", Way.DATA, read))
            found.append(
                Exchange(f"by control: {body.hex()}", Way.CONTROL, ptm(SET_LOCALITY, body))
            )
            found.append(Exchange(f"extend behind {body.hex()}", Way.DATA, extend))
        yield Session(
            f"locality {_version(tpm2=tpm2)}",
            tpm2,
            tuple(found),
            flags=("not-need-init", "startup-clear"),
            locality=("allow-set-locality", "reject-locality-4"),
        )


def _life_sessions() -> Iterator[Session]:
    """Resets, automatic shutdown, volatile state, migration: in all orders that matter."""
    for tpm2 in (True, False):
        some = ((), ("disable-auto-shutdown",), ("not-need-init", "startup-clear"))
        for flags in some if tpm2 else some[:1]:  # TPM 1.2 has no such shutdown, and starts slowly
            name = f"life {_version(tpm2=tpm2)} {'+'.join(flags)}".strip()
            yield Session(name, tpm2, tuple(_life(tpm2=tpm2)), flags)


def _life(*, tpm2: bool) -> Iterator[Exchange]:
    clear, state = (
        (tpm.TPM2_STARTUP_CLEAR, tpm.TPM2_STARTUP_STATE)
        if tpm2
        else (tpm.TPM12_STARTUP_CLEAR, tpm.TPM12_STARTUP_STATE)
    )
    read = tpm.pcr_read(10) if tpm2 else tpm.tpm12_pcr_read(10)
    extend = tpm.pcr_extend(10, b"\1" * 32) if tpm2 else tpm.tpm12_pcr_extend(10, b"\1" * 20)
    ends = (
        [("state", tpm.TPM2_SHUTDOWN_STATE), ("clear", tpm.TPM2_SHUTDOWN_CLEAR)]
        if tpm2
        else [("state", tpm.TPM12_SAVE_STATE)]
    )
    init, delete = ptm(INIT, bytes(4)), ptm(INIT, _u32(1))
    number = 0

    def step(name: str, message: bytes, way: Way = Way.CONTROL) -> Exchange:
        nonlocal number
        number += 1
        return Exchange(f"{number}: {name}", way, message)

    for reset in ("init", "stop and init"):
        for end_name, end in [("nothing", b""), ("random", read), *ends]:
            for begin_name, begin in (("clear", clear), ("state", state)):
                about = f"{begin_name} after {end_name}, {reset}"
                yield step("init", init)
                yield step("startup", clear, Way.DATA)
                yield step("extend", extend, Way.DATA)
                if end:
                    yield step(f"end by {end_name}", end, Way.DATA)
                if reset != "init":
                    yield step("stop", ptm(STOP))
                yield step("init", init)
                yield step(f"startup {about}", begin, Way.DATA)
                yield step(f"pcr {about}", read, Way.DATA)
    yield step("startup", clear, Way.DATA)
    yield step("extend", extend, Way.DATA)
    yield step("store volatile", ptm(STORE_VOLATILE))
    for message in (init, init, delete, init, ptm(STOP)):
        yield step(f"volatile: {message.hex()}", message)
        yield step("resumed", read, Way.DATA)
        yield step("startup after resume", clear, Way.DATA)
    yield from _migration(step, init, read, extend, clear, prefix="plain")
    if tpm2:
        yield step("hash before startup: init", init)
        yield step("hash start", ptm(HASH_START))
        yield step("hash", hash_data(b"firmware"))
        yield step("hash end", ptm(HASH_END))
        yield step("startup", clear, Way.DATA)
        yield step("pcr 0", tpm.pcr_read(0), Way.DATA)
        yield step("pcr 17", tpm.pcr_read(17), Way.DATA)
        yield step("established", ptm(GET_ESTABLISHED))
        yield step("locality", ptm(SET_LOCALITY, b"\3"))
        yield step("locality survives: init", init)
        yield step("startup in locality 3", clear, Way.DATA)
        yield step("extend 17", tpm.pcr_extend(17, bytes(32)), Way.DATA)
        yield step("locality 1", ptm(SET_LOCALITY, b"\1"))
        yield step("init", init)
        yield step("startup in locality 1", clear, Way.DATA)


def _migration(
    step: Callable[[str, bytes], Exchange],
    init: bytes,
    read: bytes,
    extend: bytes,
    clear: bytes,
    *,
    prefix: str,
) -> Iterator[Exchange]:
    """State out and in again, the TPM as it was."""

    def data(name: str, command: bytes) -> Exchange:
        made = step(name, command)
        return Exchange(made.name, Way.DATA, command)

    def give(kind: int, source: str) -> Exchange:
        def message(answers: dict[str, bytes]) -> bytes:
            answer = answers[source]
            flags = int.from_bytes(answer[4:8], "big")
            return set_blob(kind, answer[16:], flags)

        made = step(f"{prefix}: give {kind}", b"")
        return Exchange(made.name, Way.CONTROL, message)

    yield step(f"{prefix}: init", init)
    yield data("startup", clear)
    yield data("extend", extend)
    gets = {}
    for kind in (PERMANENT, VOLATILE, SAVESTATE):
        taken = step(f"{prefix}: take {kind}", get_blob(kind))
        gets[kind] = taken.name
        yield taken
    yield data("the source goes on", read)
    yield step(f"{prefix}: stop", ptm(STOP))
    for kind in (PERMANENT, VOLATILE):
        yield give(kind, gets[kind])
    yield step(f"{prefix}: give no savestate", set_blob(SAVESTATE, b""))
    yield step(f"{prefix}: init with it", init)
    yield data("resumed", read)
    yield step(f"{prefix}: stop again", ptm(STOP))
    yield give(PERMANENT, gets[PERMANENT])
    yield step(f"{prefix}: give a damaged volatile", set_blob(VOLATILE, b"rubbish" * 10))
    yield step(f"{prefix}: init after damage", init)
    yield data("startup after damage", clear)
    yield data("read after damage", read)


def _key_sessions() -> Iterator[Session]:
    """Blobs of an encrypted state, with and without a migration key."""
    for tpm2 in (True, False):
        clear = tpm.TPM2_STARTUP_CLEAR if tpm2 else tpm.TPM12_STARTUP_CLEAR
        read = tpm.pcr_read(10) if tpm2 else tpm.tpm12_pcr_read(10)
        extend = tpm.pcr_extend(10, b"\1" * 32) if tpm2 else tpm.tpm12_pcr_extend(10, b"\1" * 20)
        for migration_key in (False, True):
            number = 0

            def step(name: str, message: bytes, way: Way = Way.CONTROL) -> Exchange:
                nonlocal number
                number += 1
                return Exchange(f"{number}: {name}", way, message)

            found = [step("config", ptm(GET_CONFIG))]
            found += _migration(step, ptm(INIT, bytes(4)), read, extend, clear, prefix="keys")
            found.append(step("init", ptm(INIT, bytes(4))))
            for kind in (PERMANENT, VOLATILE, SAVESTATE):
                found.append(step(f"decrypted {kind}", get_blob(kind, decrypted=True)))
            yield Session(
                f"keys {_version(tpm2=tpm2)}{' migration' if migration_key else ''}",
                tpm2,
                tuple(found),
                migration_key=migration_key,
                file_key=True,
            )


def _version(*, tpm2: bool) -> str:
    return "TPM 2" if tpm2 else "TPM 1.2"
