"""What a TPM says of its commands, and for which of them a manager has nothing to do."""

from __future__ import annotations

import functools
import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from vtpm_cuse.wire.tpm import TpmCc
from vtpm_cuse.wire.tpm2_handles import CommandAttributes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_WORD: Final = struct.Struct(">I")
_ALWAYS_READ: Final = frozenset(
    {
        TpmCc.TPM_CC_Startup,
        TpmCc.TPM_CC_FlushContext,
        TpmCc.TPM_CC_ContextSave,
        TpmCc.TPM_CC_ContextLoad,
        TpmCc.TPM_CC_GetCapability,
        TpmCc.TPM_CC_StartAuthSession,
    }
)
"""Commands that are never simply passed on."""


class Commands(NamedTuple):
    """All commands of a TPM.

    Attributes:
        words: TPMA_CC of each, 4 bytes, big endian: all of the rest is made of these.
        attributes: By command code.
        simple: Codes of those without handles, as they are in a command.
        short: Of those with one handle, which they only use.
    """

    words: bytes
    attributes: Mapping[int, CommandAttributes]
    simple: frozenset[bytes]
    short: frozenset[bytes]


def packed(words: Iterable[int]) -> bytes:
    """Some TPMA_CC, as `Commands` has them."""
    return b"".join(map(_WORD.pack, words))


@functools.lru_cache(maxsize=4)
def commands(words: bytes) -> Commands:
    """By their TPMA_CC. All TPMs of a library have the same: nobody who wakes sorts them anew."""
    attributes = dict(CommandAttributes.of(word) for (word,) in _WORD.iter_unpack(words))
    simple, short = (
        frozenset(
            code.to_bytes(4, "big")
            for code, known in attributes.items()
            if known == CommandAttributes(handles, False, False, False) and code not in _ALWAYS_READ
        )
        for handles in (0, 1)
    )
    return Commands(words, attributes, simple, short)
