"""Commands of one client that end objects of a whole hierarchy, and the other clients'."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final

import pytest

from tests.device.managed_crowd import create_signing_key
from tests.support import commands as tpm
from tests.support import managed as m
from tests.support.commands import code_of

if TYPE_CHECKING:
    from vtpm_cuse.resmgr.manager import Connection

OWNER, ENDORSEMENT, PLATFORM = 0x40000001, 0x4000000B, 0x4000000C
HIERARCHIES: Final = (OWNER, ENDORSEMENT, PLATFORM, m.NULL)
GONE: Final = 0x000B0910


def by_platform(code: int, parameters: bytes = b"") -> bytes:
    return tpm.tpm2(code, m.u32(PLATFORM) + m.PASSWORD + parameters, sessions=True)


def control(hierarchy: int, *, on: bool) -> bytes:
    """TPM2_HierarchyControl by the platform."""
    return by_platform(0x121, m.u32(hierarchy) + bytes([on]))


ENDING: Final = {
    "TPM2_Clear": (by_platform(0x126), {OWNER, ENDORSEMENT}),
    "TPM2_ChangeEPS": (by_platform(0x124), {ENDORSEMENT}),
    "TPM2_ChangePPS": (by_platform(0x125), {PLATFORM}),
    "TPM2_HierarchyControl": (control(OWNER, on=False), {OWNER}),
}


def code(client: Connection, command: bytes) -> int:
    return code_of(client.process(command))


@pytest.mark.parametrize("name", ENDING)
@pytest.mark.parametrize("others", [0, 4])
def test_what_ends_and_what_does_not(name: str, others: int) -> None:
    """Be it loaded at that moment, or swapped out for *others*."""
    command, ends = ENDING[name]
    with m.managed() as manager:
        victim, other = manager.connect(), manager.connect()
        keys = {one: m.opened(victim, create_signing_key(1, one)) for one in HIERARCHIES}
        publics = {one: victim.process(m.read_public(key)) for one, key in keys.items()}
        contexts = {one: m.context_in(victim.process(m.save(key))) for one, key in keys.items()}
        sequence = m.opened(victim, m.sequence_start())
        assert code(victim, m.sequence_update(sequence, b"ab")) == 0
        sessions = [m.opened(victim, m.start_session()) for _ in range(4)]
        for number in range(others):
            m.opened(other, m.load_external(number))
        assert code(other, command) == 0
        for number in range(4):  # the TPM gives its numbers again
            m.opened(other, m.load_external(10 + number))
        for one, key in keys.items():
            answer = victim.process(m.read_public(key))
            assert answer == publics[one] if one not in ends else code_of(answer) == GONE
            loads = code(victim, m.load(contexts[one]))
            assert (loads == 0) == (one not in ends)
        assert [code(victim, m.policy_digest(session)) for session in sessions] == [0] * 4
        digest = m.digest_in(victim.process(m.sequence_complete(sequence)))
        assert digest == hashlib.sha256(b"ab").digest()


def test_what_has_a_copy_is_back_with_its_hierarchy() -> None:
    with m.managed() as manager:
        victim, other = manager.connect(), manager.connect()
        keys = [m.opened(victim, create_signing_key(number, OWNER)) for number in range(5)]
        publics = [victim.process(m.read_public(key)) for key in keys]
        assert all(found.context is not None for found in victim.objects.values())
        assert code(other, control(OWNER, on=False)) == 0
        assert [code(victim, m.read_public(key)) for key in keys] == [GONE] * 5
        assert code(other, control(OWNER, on=True)) == 0
        assert [victim.process(m.read_public(key)) for key in keys] == publics


def test_an_event_sequence_ends_and_its_pcr_does_not() -> None:
    """TPM2_EventSequenceComplete has the PCR for its first handle."""
    with m.managed() as manager:
        client = manager.connect()
        start = tpm.tpm2(0x186, m.sized(b"") + b"\0\x10")  # TPM_ALG_NULL: of events
        sequence, key = m.opened(client, start), m.opened(client, m.load_external(1))
        area = m.u32(18) + 2 * m.PASSWORD[4:]
        for pcr, expected in ((0x01000099, 0x184), (16, 0)):
            complete = tpm.tpm2(0x185, m.u32(pcr, sequence) + area + m.sized(b"ab"), sessions=True)
            assert code(client, complete) == expected
            left = [sequence, key] if expected else [key]
            assert m.listed(client.process(m.list_handles(0x80000000))) == left


def test_a_handle_that_a_command_has_twice_is_loaded_once() -> None:
    """TPM2_Certify of a key by itself, while it is swapped out."""
    with m.managed() as manager:
        client = manager.connect()
        key = m.opened(client, create_signing_key(1, OWNER))
        for number in range(3):
            m.opened(client, m.load_external(number))
        loaded = manager.objects.evictions
        area = m.u32(18) + 2 * m.PASSWORD[4:]
        parameters = m.sized(b"") + b"\0\x10"
        certify = tpm.tpm2(0x148, m.u32(key, key) + area + parameters, sessions=True)
        assert code(client, certify) == 0
        assert manager.objects.evictions == loaded + 1
        assert code(client, m.read_public(key)) == 0
