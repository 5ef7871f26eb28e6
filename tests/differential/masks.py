"""Which bytes of an answer depend on chance, on time or on a key made by chance: by name.

A mask sees the command and its successful answer, and returns the answer with those bytes
replaced; lengths always stay.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from tests.differential.exchanges import GET_BLOB, Way

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_TPM2_HEADER: Final = 10


def _behind(offset: int) -> Callable[[bytes], bytes]:
    return lambda answer: answer[:offset] + bytes(max(0, len(answer) - offset))


TPM2_MASKS: Final[Mapping[int, tuple[str, Callable[[bytes], bytes]]]] = {
    0x17B: ("random bytes (GetRandom)", _behind(12)),
    0x176: ("nonce of the TPM (StartAuthSession)", _behind(16)),
    0x181: ("clock (ReadClock)", _behind(10)),
    0x14C: ("clock and signature (GetTime)", _behind(14)),
    0x158: ("clock and signature (Quote)", _behind(14)),
    0x15D: ("signature (Sign with ECDSA)", _behind(14)),
    0x153: ("key made by chance (Create)", _behind(14)),
    0x162: ("sequence and ciphertext (ContextSave)", _behind(10)),
    0x163: ("ephemeral key (ECDH_KeyGen)", _behind(10)),
    0x18E: ("ephemeral key (EC_Ephemeral)", _behind(10)),
    0x177: ("random padding and seeds (Duplicate, Import, MakeCredential)", _behind(10)),
    0x168: ("random seed (MakeCredential)", _behind(10)),
}
"""Command code of a successful TPM 2 command to a mask."""

TPM12_MASKS: Final[Mapping[int, tuple[str, Callable[[bytes], bytes]]]] = {
    0x46: ("random bytes (GetRandom)", _behind(14)),
    0x0A: ("handle and nonce (OIAP)", _behind(10)),
    0xF1: ("ticks (GetTicks)", _behind(10)),
    0x7C: ("key made by chance (ReadPubek)", _behind(10)),
}

BLOB_HEADER: Final = 16 + 10
"""Of a GET_STATEBLOB answer: four numbers, then the blob's own header."""


def mask(way: Way, message: bytes, answer: bytes, *, tpm2: bool) -> bytes:
    """The answer without what depends on chance."""
    if way is Way.CONTROL:
        if int.from_bytes(message[:4], "big") == GET_BLOB and answer[:4] == bytes(4):
            # "state blob": seeds, clock and initialisation vectors; header and length stay.
            return _behind(BLOB_HEADER if message[12:16] == bytes(4) else 16)(answer)
        return answer
    prefix = 0
    if tpm2 and message[:4] == bytes((0, 0, 0, 8)):
        message, prefix = message[9:], 4
    code = int.from_bytes(message[6:10], "big")
    masks = TPM2_MASKS if tpm2 else TPM12_MASKS
    if code in masks and answer[prefix + 6 : prefix + _TPM2_HEADER] == bytes(4):
        return answer[:prefix] + masks[code][1](answer[prefix:])
    return answer
