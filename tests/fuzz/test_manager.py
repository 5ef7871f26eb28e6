"""Commands with broken handle and authorization areas: the TPM's own answers, and the manager's.

Each is given to a TPM, and through the resource manager to one that is its like. What the TPM takes
the manager takes, what it refuses is refused, and by the same code but where `_explained` says why.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Final

import pytest

from tests.fuzz.harness import SEED, mutated
from tests.support import commands as tpm
from tests.support import managed as m
from tests.support.commands import code_of
from vtpm_cuse.engine.libtpms import LibtpmsEngine
from vtpm_cuse.resmgr.manager import Manager
from vtpm_cuse.storage.memory import MemoryStore
from vtpm_cuse.wire import names

if TYPE_CHECKING:
    from collections.abc import Iterator

COMMANDS: Final = 1200
KEY, SEQUENCE, OTHER_KEY = 0x80000000, 0x80000001, 0x80000002
POLICY, HMAC = 0x03000000, 0x02000001
THERE: Final = (KEY, SEQUENCE, OTHER_KEY, POLICY, HMAC)
LAYER: Final = 0xB0000
HANDLES: Final = (
    *THERE,
    *(0x80000003, 0x80FFFFFE, 0x80FFFFFF, 0x03000001, 0x02000000, 0x02000005, 0x03000041),
    *(0x81000000, 0x40000001, 0x40000007, 0x40000009, 0x01C00000, 0x04000000, 0x90000000),
    *(0, 23, 24, 0xFFFFFFFF),
)
SIZES: Final = (0, 1, 2, 8, 9, 10, 13, 72, 0x7FFFFFFF)
LOAD: Final = m.load(b"")[6:10]
FIXED: Final = {0x173, 0x189, 0x15C, 0x13E, 0x17E, 0x182, 0x165}
"""Commands whose answers have nothing of chance in them."""


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


def answers(blobs: dict[str, bytes], commands: list[bytes], *, managed: bool) -> list[bytes]:
    """Each command's answer, of a TPM in which nothing has happened yet but what all begin with."""
    found = []
    for command in commands:
        store = MemoryStore()
        store.blobs = dict(blobs)
        engine = LibtpmsEngine(tpm2=True, nvram=store)
        engine.start()
        process = Manager(engine).connect().process if managed else engine.process
        process(tpm.TPM2_STARTUP_CLEAR)
        first = (m.load_external(1), m.sequence_start(), m.load_external(2))
        made = (*first, m.start_session(), m.start_session(0))
        assert tuple(m.handle_of(process(one)) for one in made) == THERE
        found.append(process(command))
        engine.stop()
    return found


def parameters(answer: bytes) -> bytes:
    """Without the sessions' area, which has nonces."""
    size = int.from_bytes(answer[10:14], "big")
    return answer[14 : 14 + size] if answer[:2] == b"\x80\x02" else answer[10:]


def _named(command: bytes, code: int) -> int:
    """The handle that a TPM_RC_REFERENCE code speaks of."""
    if code & 8 == 0:
        at = 10 + 4 * (code & 7)
        return int.from_bytes(command[at : at + 4], "big")
    shape = names.shape_of(int.from_bytes(command[6:10], "big"), tpm12=False)
    assert shape is not None
    at = 10 + 4 * shape.handles + 4
    for _ in range(code & 7):
        at += 4
        at += 2 + int.from_bytes(command[at : at + 2], "big") + 1
        at += 2 + int.from_bytes(command[at : at + 2], "big")
    return int.from_bytes(command[at : at + 4], "big")


def _explained(command: bytes, raw: int, managed: int) -> str:
    """Why the manager says another code than the TPM; nothing where there is no reason."""
    if raw == 0 or managed == 0:
        return ""
    code = managed & 0xFFFF
    shape = names.shape_of(int.from_bytes(command[6:10], "big"), tpm12=False)
    if managed == LAYER | 0x9A and shape and len(command) < 10 + 4 * shape.handles:
        return "a handle area that is cut short; the TPM names the handle, or an earlier one"
    if managed == LAYER | 0x143 == LAYER | raw:
        return "a command that there is not: the TPM was not asked"
    if managed == LAYER | 0x1CB and (raw in {0x1C4, 0x1CB} or command[6:10] == LOAD):
        return "nothing of the client's to flush or load, whatever else is wrong with it"
    if raw == 0x902 and 0x81 in command:
        return "a persistent object needs a slot, for which the manager makes room"
    if managed & ~0xFFFF == LAYER and 0x910 <= code < 0x920:
        handle, there = _named(command, code), {one & 0xFFFFFF for one in (POLICY, HMAC)}
        missing = handle >> 24 == 0x80 and handle not in THERE
        missing |= handle >> 24 in {2, 3} and handle & 0xFFFFFF not in there
        return "not the client's; the TPM may object to another thing first" if missing else ""
    return ""


@pytest.fixture(scope="module")
def blobs() -> dict[str, bytes]:
    store = MemoryStore()
    engine = LibtpmsEngine(tpm2=True, nvram=store)
    engine.start()
    engine.process(tpm.TPM2_STARTUP_CLEAR)
    engine.stop()
    return dict(store.blobs)


def test_the_manager_refuses_what_the_tpm_refuses(blobs: dict[str, bytes]) -> None:
    chance = random.Random(SEED)  # noqa: S311
    commands = list(seeds())
    commands += [broken(chance, chance.choice(commands)) for _ in range(COMMANDS)]
    reasons: set[str] = set()
    kinds: set[int] = set()
    raw, managed = (answers(blobs, commands, managed=way) for way in (False, True))
    for command, expected, found in zip(commands, raw, managed, strict=True):
        code = code_of(expected)
        kinds.add(code)
        if code == code_of(found):
            if code == 0 and int.from_bytes(command[6:10], "big") in FIXED:
                assert parameters(found) == parameters(expected), command.hex()
            continue
        reason = _explained(command, code, code_of(found))
        assert reason, (command.hex(), expected.hex(), found.hex())
        reasons.add(reason)
    assert len(kinds) > 30
    assert len(reasons) == 5
