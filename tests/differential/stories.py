"""Commands written by hand: for each TPM version something of everything, with a name each."""

from __future__ import annotations

import struct
from typing import Final

from tests.differential.exchanges import u32
from tests.support import commands as tpm

# -- TPM 2.0 commands ---------------------------------------------------------------------

PASSWORD: Final = bytes.fromhex("00000009400000090000000000")
OWNER, _NULL, _ENDORSEMENT, _PLATFORM = 0x40000001, 0x40000007, 0x4000000B, 0x4000000C
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
    area = PASSWORD[4:] * sessions
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
OBJECT: Final = 0x80000000


def _nv_attributes(index: int, attributes: int, size: int) -> bytes:
    public = struct.pack(">IHIHH", index, _SHA256, attributes, 0, size)
    return _auth(0x12A, u32(OWNER), _b(b"") + _b(public))


def tpm2_story() -> list[tuple[str, bytes]]:
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
        ("clock rate", _auth(0x130, u32(OWNER), b"\0")),
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
            (f"reset pcr {pcr}", _auth(0x13D, u32(pcr))),
            (f"event pcr {pcr}", _auth(0x13C, u32(pcr), _b(b"event"))),
        ]
    for algorithm in (_SHA1, _SHA256, _SHA384, _SHA512, 0x12, 0xFFFF):
        story += [
            (f"read bank {algorithm:x}", tpm.tpm2(0x17E, _pcr_selection(algorithm, 0, 1, 2, 10))),
            (
                f"hash {algorithm:x}",
                tpm.tpm2(0x17D, _b(b"abc") + struct.pack(">HI", algorithm, OWNER)),
            ),
            (f"hash start {algorithm:x}", tpm.tpm2(0x186, _b(b"") + struct.pack(">H", algorithm))),
            (f"flush sequence {algorithm:x}", tpm.tpm2(0x165, u32(OBJECT))),
        ]
    story += [
        ("sequence", tpm.tpm2(0x186, _b(b"") + struct.pack(">H", _SHA256))),
        ("sequence update", _auth(0x15C, u32(OBJECT), _b(b"part"))),
        ("sequence end", _auth(0x13E, u32(OBJECT), _b(b"rest") + u32(OWNER))),
        ("sequence gone", _auth(0x15C, u32(OBJECT), _b(b"part"))),
        ("primary storage", _primary(OWNER, _STORAGE_PUBLIC)),
        ("read public", tpm.tpm2(0x173, u32(OBJECT))),
        ("create", _auth(0x153, u32(OBJECT), _b(bytes(4)) + _b(_ECC_PUBLIC) + _b(b"") + u32(0))),
        ("evict", _auth(0x120, u32(OWNER, OBJECT), u32(0x81000001))),
        ("evict again", _auth(0x120, u32(OWNER, OBJECT), u32(0x81000001))),
        ("read persistent", tpm.tpm2(0x173, u32(0x81000001))),
        ("evict out", _auth(0x120, u32(OWNER, 0x81000001), u32(0x81000001))),
        ("context save", tpm.tpm2(0x162, u32(OBJECT))),
        ("context load rubbish", tpm.tpm2(0x161, bytes(40))),
        ("flush", tpm.tpm2(0x165, u32(OBJECT))),
        ("flush again", tpm.tpm2(0x165, u32(OBJECT))),
        ("primary signing", _primary(OWNER, _ECC_PUBLIC)),
        (
            "quote",
            _auth(
                0x158,
                u32(OBJECT),
                _b(b"q") + struct.pack(">HH", 0x18, _SHA256) + _pcr_selection(_SHA256, 0),
            ),
        ),
        (
            "sign",
            _auth(
                0x15D,
                u32(OBJECT),
                _b(b"\1" * 32)
                + struct.pack(">HH", 0x18, _SHA256)
                + struct.pack(">HIH", 0x8024, _NULL, 0),
            ),
        ),
        (
            "get time",
            _auth(0x14C, u32(_ENDORSEMENT, OBJECT), _b(b"") + struct.pack(">H", 0x10), sessions=2),
        ),
        ("ecc parameters", tpm.tpm2(0x178, struct.pack(">H", 3))),
        ("test parameters", tpm.tpm2(0x18A, bytes.fromhex("0001008000430800001400000000"))),
        ("flush signing", tpm.tpm2(0x165, u32(OBJECT))),
        ("primary rsa", tpm.create_primary_rsa()),
        ("flush rsa", tpm.tpm2(0x165, u32(OBJECT))),
        ("primary endorsement", _primary(_ENDORSEMENT, _STORAGE_PUBLIC)),
        ("flush endorsement", tpm.tpm2(0x165, u32(OBJECT))),
        ("primary null", _primary(_NULL, _STORAGE_PUBLIC)),
        ("flush null", tpm.tpm2(0x165, u32(OBJECT))),
        ("nv define", tpm.nv_define(_NV, 32)),
        ("nv define again", tpm.nv_define(_NV, 32)),
        ("nv read before write", tpm.nv_read(_NV, 32)),
        ("nv write", tpm.nv_write(_NV, b"0123456789abcdef" * 2)),
        ("nv read", tpm.nv_read(_NV, 32)),
        ("nv read past the end", tpm.nv_read(_NV, 33)),
        ("nv read public", tpm.tpm2(0x169, u32(_NV))),
        ("nv write lock", _auth(0x138, u32(OWNER, _NV))),
        ("nv undefine", _auth(0x122, u32(OWNER, _NV))),
        ("nv counter", _nv_attributes(_NV + 1, 0x00020012, 8)),
        ("nv increment", _auth(0x134, u32(OWNER, _NV + 1))),
        ("nv increment again", _auth(0x134, u32(OWNER, _NV + 1))),
        ("nv counter read", tpm.nv_read(_NV + 1, 8)),
        ("nv bits", _nv_attributes(_NV + 2, 0x00020022, 8)),
        ("nv set bits", _auth(0x135, u32(OWNER, _NV + 2), struct.pack(">Q", 5))),
        ("nv extendable", _nv_attributes(_NV + 3, 0x00020042, 32)),
        ("nv extend", _auth(0x136, u32(OWNER, _NV + 3), _b(b"measured"))),
        ("nv extended", tpm.nv_read(_NV + 3, 32)),
        ("nv of silly size", _nv_attributes(_NV + 4, 0x00020002, 60000)),
        ("trial policy", _start_session(3)),
        ("policy pcr", tpm.tpm2(0x17F, u32(_POLICY) + _b(b"") + _pcr_selection(_SHA256, 0))),
        ("policy command code", tpm.tpm2(0x16C, u32(_POLICY, 0x153))),
        ("policy auth value", tpm.tpm2(0x16B, u32(_POLICY))),
        ("policy locality", tpm.tpm2(0x16F, u32(_POLICY) + b"\1")),
        ("policy or", tpm.tpm2(0x171, u32(_POLICY, 2) + _b(bytes(32)) + _b(b"\1" * 32))),
        ("policy digest", tpm.tpm2(0x189, u32(_POLICY))),
        ("policy restart", tpm.tpm2(0x180, u32(_POLICY))),
        ("policy digest after restart", tpm.tpm2(0x189, u32(_POLICY))),
        ("flush policy", tpm.tpm2(0x165, u32(_POLICY))),
        ("hmac session", _start_session(0)),
        ("flush hmac session", tpm.tpm2(0x165, u32(_HMAC_SESSION))),
        ("loaded session of a bad kind", _start_session(2)),
        ("dictionary attack reset", _auth(0x139, u32(_LOCKOUT))),
        ("dictionary attack parameters", _auth(0x13A, u32(_LOCKOUT), u32(10, 20, 30))),
        ("set owner password", _auth(0x129, u32(OWNER), _b(b"secret"))),
        ("owner without password", _nv_attributes(_NV + 5, 0x00020002, 8)),
        ("set lockout password", _auth(0x129, u32(_LOCKOUT), _b(b"secret"))),
        ("lockout without password", _auth(0x139, u32(_LOCKOUT))),
        ("hierarchy off", _auth(0x121, u32(_PLATFORM), struct.pack(">IB", _ENDORSEMENT, 0))),
        ("hierarchy off, used", _primary(_ENDORSEMENT, _STORAGE_PUBLIC)),
        ("hierarchy on", _auth(0x121, u32(_PLATFORM), struct.pack(">IB", _ENDORSEMENT, 1))),
        ("shutdown state", tpm.TPM2_SHUTDOWN_STATE),
        ("random after shutdown", tpm.get_random(4)),
        ("shutdown clear", tpm.TPM2_SHUTDOWN_CLEAR),
        ("shutdown of a bad kind", tpm.tpm2(0x145, b"\0\2")),
    ]
    return story


def tpm2_last_story() -> list[tuple[str, bytes]]:
    """What gives the TPM new secrets; later answers depend on them."""
    return [
        ("startup", tpm.TPM2_STARTUP_CLEAR),
        ("set owner password", _auth(0x129, u32(OWNER), _b(b"secret"))),
        ("clear by platform", _auth(0x126, u32(_PLATFORM))),
        ("owner after clear", _nv_attributes(_NV + 5, 0x00020002, 8)),
        ("new endorsement seed", _auth(0x124, u32(_PLATFORM))),
        ("new platform seed", _auth(0x125, u32(_PLATFORM))),
        ("shutdown", tpm.TPM2_SHUTDOWN_STATE),
        ("random after shutdown", tpm.get_random(4)),
    ]


NOT_CHANGED: Final = frozenset({0x11F, 0x124, 0x125, 0x126, 0x131, 0x153, 0x191, 0x197, 0x144})
"""TPM 2 commands that generated ones leave alone: those that make new seeds, and the slow ones."""


# -- TPM 1.2 commands ---------------------------------------------------------------------


def tpm12_story() -> list[tuple[str, bytes]]:
    def capability(area: int, sub: bytes = b"") -> bytes:
        return tpm.tpm12(0x65, u32(area, len(sub)) + sub)

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
        ("sha1 update", tpm.tpm12(0xA1, u32(64) + bytes(64))),
        ("sha1 complete", tpm.tpm12(0xA2, u32(3) + b"abc")),
        ("sha1 without start", tpm.tpm12(0xA2, u32(3) + b"abc")),
        ("sha1 extend", tpm.tpm12(0xA3, u32(10, 3) + b"abc")),
        ("stir random", tpm.tpm12(0x47, u32(4) + b"stir")),
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
        ("random while disabled", tpm.tpm12(0x46, u32(8))),
        ("enable again", tpm.tpm12(0x6F)),
        ("force clear", tpm.tpm12(0x5D)),
    ]
    story += [(f"random {n}", tpm.tpm12(0x46, u32(n))) for n in (0, 1, 20, 128, 4000, 1 << 31)]
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
        for sub in (b"", u32(0), u32(0x101), u32(0x103), u32(0x108), u32(0x10F), u32(0x11B)):
            story.append((f"capability {area:x}, {sub.hex() or 'none'}", capability(area, sub)))
    story += [
        ("save state", tpm.TPM12_SAVE_STATE),
        ("read after save state", tpm.tpm12_pcr_read(10)),
        ("startup state", tpm.TPM12_STARTUP_STATE),
    ]
    return story


NOT_CHANGED_12: Final = frozenset({0x0D, 0x1F, 0x78, 0x79, 0x7F, 0x99})
