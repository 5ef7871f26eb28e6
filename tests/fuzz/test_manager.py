"""Commands with broken handle and authorization areas: the TPM's own answers, and the manager's.

Each is given to a TPM, and through the resource manager to one that is its like. What the TPM takes
the manager takes, what it refuses is refused, and by the same code but where `_explained` says why.
"""

from __future__ import annotations

import random
from typing import Final

import pytest

from tests.fuzz.harness import SEED
from tests.support import commands as tpm
from tests.support import managed as m
from tests.support.broken_commands import HMAC, POLICY, THERE, broken, seeds
from tests.support.commands import code_of
from vtpm_cuse.engine.libtpms import LibtpmsEngine
from vtpm_cuse.resmgr.manager import Manager
from vtpm_cuse.storage.memory import MemoryStore
from vtpm_cuse.wire import names

COMMANDS: Final = 1200
LAYER: Final = 0xB0000
LOAD: Final = m.load(b"")[6:10]
FIXED: Final = {0x173, 0x189, 0x15C, 0x13E, 0x17E, 0x182, 0x165}
"""Commands whose answers have nothing of chance in them."""


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
