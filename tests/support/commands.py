"""TPM commands as literal bytes, and the few answers tests look into.

Deliberately free of the package's own structures: a mistake there must not
cancel out here.
"""

from __future__ import annotations

import struct
from typing import Final

TPM2_STARTUP_CLEAR: Final = bytes.fromhex("80010000000c000001440000")
TPM2_STARTUP_STATE: Final = bytes.fromhex("80010000000c000001440001")
TPM2_SHUTDOWN_CLEAR: Final = bytes.fromhex("80010000000c000001450000")
TPM2_SHUTDOWN_STATE: Final = bytes.fromhex("80010000000c000001450001")
TPM2_READ_CLOCK: Final = bytes.fromhex("80010000000a00000181")

TPM12_STARTUP_CLEAR: Final = bytes.fromhex("00c10000000c000000990001")
TPM12_STARTUP_STATE: Final = bytes.fromhex("00c10000000c000000990002")
TPM12_SAVE_STATE: Final = bytes.fromhex("00c10000000a00000098")
TPM12_CONTINUE_SELF_TEST: Final = bytes.fromhex("00c10000000a00000053")
TPM12_PHYSICAL_PRESENCE_CMD_ENABLE: Final = bytes.fromhex("00c10000000c4000000a0020")
TPM12_PHYSICAL_PRESENCE_PRESENT: Final = bytes.fromhex("00c10000000c4000000a0008")

NV_INDEX: Final = 0x01500017
_PASSWORD_SESSION: Final = bytes.fromhex("00000009400000090000000000")
_RH_OWNER: Final = 0x40000001
_SHA256: Final = 0x000B


def code_of(response: bytes) -> int:
    """The response code."""
    return int.from_bytes(response[6:10], "big")


def tpm2(code: int, body: bytes = b"", *, sessions: bool = False) -> bytes:
    """A whole TPM 2 command."""
    return struct.pack(">HII", 0x8002 if sessions else 0x8001, 10 + len(body), code) + body


def tpm12(ordinal: int, body: bytes = b"") -> bytes:
    """A whole TPM 1.2 command without authorisation."""
    return struct.pack(">HII", 0x00C1, 10 + len(body), ordinal) + body


# -- TPM 2.0 ------------------------------------------------------------------------------


def get_random(count: int) -> bytes:
    return tpm2(0x17B, struct.pack(">H", count))


def pcr_extend(pcr: int, digest: bytes) -> bytes:
    """TPM2_PCR_Extend of the SHA-256 bank."""
    body = struct.pack(">I", pcr) + _PASSWORD_SESSION + struct.pack(">IH", 1, _SHA256) + digest
    return tpm2(0x182, body, sessions=True)


def pcr_read(pcr: int) -> bytes:
    """TPM2_PCR_Read of the SHA-256 bank."""
    selection = bytearray(3)
    selection[pcr // 8] = 1 << pcr % 8
    return tpm2(0x17E, struct.pack(">IHB", 1, _SHA256, 3) + selection)


def pcr_value(response: bytes) -> bytes:
    """The digest in the answer to `pcr_read`."""
    assert code_of(response) == 0, response.hex()
    return response[-32:]


def create_primary_rsa(*, bits: int = 2048, unique: bytes = b"") -> bytes:
    """TPM2_CreatePrimary of an RSA signing key below the owner; takes from 0.1 s to seconds."""
    sensitive = bytes.fromhex("000400000000")
    public = struct.pack(">HHIH", 0x0001, _SHA256, 0x00040072, 0)
    public += (
        struct.pack(">HHHI", 0x0010, 0x0010, bits, 0) + struct.pack(">H", len(unique)) + unique
    )
    body = struct.pack(">I", _RH_OWNER) + _PASSWORD_SESSION + sensitive
    body += struct.pack(">H", len(public)) + public + struct.pack(">HI", 0, 0)
    return tpm2(0x131, body, sessions=True)


def nv_define(index: int, size: int) -> bytes:
    """TPM2_NV_DefineSpace of an ordinary index that its owner reads and writes."""
    public = struct.pack(">IHIHH", index, _SHA256, 0x00020002, 0, size)
    body = struct.pack(">I", _RH_OWNER) + _PASSWORD_SESSION + struct.pack(">H", 0)
    return tpm2(0x12A, body + struct.pack(">H", len(public)) + public, sessions=True)


def nv_write(index: int, data: bytes) -> bytes:
    body = struct.pack(">II", _RH_OWNER, index) + _PASSWORD_SESSION
    return tpm2(0x137, body + struct.pack(">H", len(data)) + data + b"\0\0", sessions=True)


def nv_read(index: int, size: int) -> bytes:
    body = struct.pack(">II", _RH_OWNER, index) + _PASSWORD_SESSION
    return tpm2(0x14E, body + struct.pack(">HH", size, 0), sessions=True)


def nv_data(response: bytes) -> bytes:
    """The contents in the answer to `nv_read`."""
    assert code_of(response) == 0, response.hex()
    (size,) = struct.unpack_from(">H", response, 14)
    return response[16 : 16 + size]


# -- TPM 1.2 ------------------------------------------------------------------------------


def tpm12_pcr_extend(pcr: int, digest: bytes) -> bytes:
    return tpm12(0x14, struct.pack(">I", pcr) + digest)


def tpm12_pcr_read(pcr: int) -> bytes:
    return tpm12(0x15, struct.pack(">I", pcr))


def tpm12_nv_define(index: int, size: int) -> bytes:
    """TPM_NV_DefineSpace without owner: anybody may write and read as long as NV is unlocked."""
    pcr_info = struct.pack(">H3xB20x", 3, 0x1F)
    public = struct.pack(">HI", 0x0018, index) + pcr_info + pcr_info
    public += struct.pack(">HI", 0x0017, 0x00000001) + bytes(3) + struct.pack(">I", size)
    return tpm12(0xCC, public + bytes(20))


def tpm12_nv_write(index: int, data: bytes) -> bytes:
    return tpm12(0xCD, struct.pack(">III", index, 0, len(data)) + data)


def tpm12_nv_read(index: int, size: int) -> bytes:
    return tpm12(0xCF, struct.pack(">III", index, 0, size))


def tpm12_nv_data(response: bytes) -> bytes:
    assert code_of(response) == 0, response.hex()
    return response[14:]
