"""Commands with broken handle and authorization areas, of a client who has what is `THERE`, or not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from tests.fuzz.harness import mutated
from tests.support import commands as tpm
from tests.support import managed as m

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

KEY, SEQUENCE, OTHER_KEY = 0x80000000, 0x80000001, 0x80000002
POLICY, HMAC = 0x03000000, 0x02000001
THERE: Final = (KEY, SEQUENCE, OTHER_KEY, POLICY, HMAC)
HANDLES: Final = (
    *THERE,
    *(0x80000003, 0x80FFFFFE, 0x80FFFFFF, 0x03000001, 0x02000000, 0x02000005, 0x03000041),
    *(0x81000000, 0x40000001, 0x40000007, 0x40000009, 0x01C00000, 0x04000000, 0x90000000),
    *(0, 23, 24, 0xFFFFFFFF),
)
SIZES: Final = (0, 1, 2, 8, 9, 10, 13, 72, 0x7FFFFFFF)


def areas() -> Iterator[bytes]:
    """Authorization areas, most of which suit no command."""
    password = m.PASSWORD[4:]
    hmac = m.u32(HMAC) + m.sized(bytes(16)) + b"\1" + m.sized(bytes(32))
    policy = m.u32(POLICY) + m.sized(b"") + b"\1" + m.sized(b"")
    four = password + policy + hmac + password
    for area in (b"", password, hmac, policy, password + hmac, hmac + policy + password, four):
        yield m.u32(len(area)) + area


def seeds() -> Iterator[bytes]:
    for area in areas():
        for code, handles, parameters in (
            (0x15C, (SEQUENCE,), m.sized(b"x")),  # SequenceUpdate
            (0x173, (KEY,), b""),  # ReadPublic
            (0x17B, (), b"\0\4"),  # GetRandom
            (0x182, (16,), m.u32(0)),  # PCR_Extend
            (0x148, (KEY, OTHER_KEY), m.sized(b"") + b"\0\x10"),  # Certify
            (0x149, (0x40000001, 0x01000000, POLICY), bytes(8)),  # PolicyNV
            (0x165, (), m.u32(KEY)),  # FlushContext
            (0x17A, (), m.u32(1, KEY, 4)),  # GetCapability
        ):
            yield tpm.tpm2(code, m.u32(*handles) + area + parameters, sessions=True)
    yield from (m.read_public(KEY), m.flush(KEY), m.flush(POLICY), m.save(KEY), m.save(POLICY))
    yield from (m.policy_digest(POLICY), m.policy_digest(HMAC), m.load(bytes(40)))
    yield from (m.start_session(), m.list_handles(KEY), m.list_handles(HMAC), tpm.pcr_read(3))
    yield m.sequence_update(SEQUENCE, b"\0\5" + bytes(510))  # its size and these are a handle
    yield from (m.sequence_complete(SEQUENCE), tpm.get_random(4), m.read_public(0x81000000))


def broken(chance: random.Random, seed: bytes) -> bytes:
    """A relative of *seed*, with other words, more bytes or fewer; mostly of the size it claims."""
    data = bytearray(seed)
    match chance.randrange(6):
        case 0:
            data = bytearray(mutated(chance, seed))
        case 1 | 2 | 3:
            for _ in range(chance.randrange(1, 3)):
                at = chance.choice((10, 14, 18, 22, 26, chance.randrange(10, len(data) + 1)))
                if at + 4 <= len(data):
                    data[at : at + 4] = m.u32(chance.choice(HANDLES + SIZES))
        case 4:
            at = chance.randrange(10, len(data) + 1)
            data[at:at] = chance.randbytes(chance.randrange(1, 9))
        case _:
            del data[chance.randrange(10, len(data) + 1) :]
    if chance.random() < 0.9 and len(data) >= 6:
        data[2:6] = m.u32(len(data))
    return bytes(data)
