"""The TPM's guard against guessing (Part 1, "Dictionary Attack Protection") beside a resource manager.

A guess is counted once, whoever makes it, and nothing that the manager does itself counts as one.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from tests.support import commands as tpm
from tests.support.commands import code_of
from tests.support.managed import (
    PASSWORD,
    load_external,
    opened,
    read_public,
    sized,
    started_engine,
    u32,
)
from vtpm_cuse.resmgr.manager import Manager

if TYPE_CHECKING:
    from collections.abc import Callable

    Process = Callable[[bytes], bytes]

_RIGHT: Final = b"right"
_FIXED_AND_BY_PASSWORD: Final = 0x52
_AUTH_FAIL, _LOCKOUT, _RETRY = 0x98E, 0x921, 0x922
_COUNTER, _TRIES_MAX = 0x20E, 0x20F  # TPM_PT_LOCKOUT_COUNTER, TPM_PT_MAX_AUTH_FAIL
SEAL: Final = tpm.tpm2(
    0x131,  # TPM2_CreatePrimary of a sealed object, which has no noDA
    u32(0x40000001)
    + PASSWORD
    + sized(sized(_RIGHT) + sized(b"secret"))
    + sized(
        struct.pack(">HHI", 8, 0xB, _FIXED_AND_BY_PASSWORD)
        + sized(b"")
        + struct.pack(">H", 0x10)
        + sized(b"")
    )
    + sized(b"")
    + u32(0),
    sessions=True,
)


def unseal(handle: int, password: bytes) -> bytes:
    """TPM2_Unseal."""
    area = u32(0x40000009) + sized(b"") + b"\0" + sized(password)
    return tpm.tpm2(0x15E, u32(handle, len(area)) + area, sessions=True)


def property_of(process: Process, number: int) -> int:
    """TPM2_GetCapability of one of TPM_CAP_TPM_PROPERTIES."""
    answer = process(tpm.tpm2(0x17A, u32(6, number, 1)))
    found, value = struct.unpack_from(">II", answer, 19)
    assert found == number
    return int(value)


def tried(process: Process, command: bytes) -> int:
    """Its code; the first use after a start is to be asked for twice with an older libtpms."""
    code = code_of(process(command))
    return code_of(process(command)) if code == _RETRY else code


def test_a_guess_counts_once_and_a_swap_never() -> None:
    with started_engine() as engine:
        manager = Manager(engine)
        one, other = manager.connect(), manager.connect()
        sealed, others = opened(one, SEAL), opened(other, SEAL)
        assert tried(one.process, unseal(sealed, _RIGHT)) == 0
        tries = property_of(engine.process, _TRIES_MAX)
        for count in range(1, tries + 1):
            assert tried(one.process, unseal(sealed, b"wrong")) == _AUTH_FAIL
            for number in range(3):  # each of which takes the place of the one before
                opened(other, load_external(number))
            assert code_of(one.process(read_public(sealed))) == 0
            counts = [property_of(process, _COUNTER) for process in (one.process, engine.process)]
            assert counts == [count, count]
        assert manager.objects.evictions > tries
        # It is the TPM that is locked, for all its clients, and all that takes no password goes on.
        for client, handle in ((one, sealed), (other, others)):
            assert tried(client.process, unseal(handle, _RIGHT)) == _LOCKOUT
            assert code_of(client.process(read_public(handle))) == 0
        assert property_of(engine.process, _COUNTER) == tries
