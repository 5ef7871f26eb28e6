"""The resource manager in front of libtpms: what each of its clients sees."""

from __future__ import annotations

import hashlib
import hmac
import random
from typing import Final

import pytest

from tests.support import commands as tpm
from tests.support.managed import (
    Gapped,
    context_in,
    digest_in,
    flush,
    handle_of,
    list_handles,
    listed,
    load,
    load_external,
    managed,
    opened,
    policy_command_code,
    policy_digest,
    read_public,
    save,
    sequence_complete,
    sequence_start,
    sequence_update,
    start_session,
    started_engine,
    u32,
    unique_of,
)
from vtpm_cuse.resmgr.manager import Connection, Manager

LAYER: Final = 0x000B0000
RANDOM: Final = tpm.get_random(8)
CLEAR: Final = bytes.fromhex(
    "80020000001b000001264000000c0000000940000009000000 0000".replace(" ", "")
)


def code(connection: Connection, command: bytes) -> int:
    return tpm.code_of(connection.process(command))


# -- room ---------------------------------------------------------------------------------


def test_a_lone_client_within_the_limits_costs_nothing() -> None:
    with managed() as manager:
        client = manager.connect()
        assert code(client, RANDOM) == 0
        handles = [opened(client, load_external(n)) for n in range(3)]
        sessions = [opened(client, start_session()) for _ in range(3)]
        before = manager.inner_commands
        for _ in range(100):
            for handle, session in zip(handles, sessions, strict=True):
                assert code(client, read_public(handle)) == 0
                assert code(client, policy_digest(session)) == 0
                assert code(client, RANDOM) == 0
        assert manager.inner_commands == before


def test_many_objects_of_several_clients() -> None:
    with managed() as manager:
        clients = [manager.connect() for _ in range(8)]
        made = {
            (client, opened(client, load_external(100 * client.number + n))): None
            for n in range(8)
            for client in clients
        }
        expected = {key: unique_of(key[0].process(read_public(key[1]))) for key in made}
        assert len(set(expected.values())) == 64
        order = list(made)
        random.Random(1).shuffle(order)  # noqa: S311
        for client, handle in order:
            assert unique_of(client.process(read_public(handle))) == expected[client, handle]


def test_an_unchanging_object_is_saved_once() -> None:
    with managed() as manager:
        client = manager.connect()
        handles = [opened(client, load_external(n)) for n in range(4)]
        for _ in range(2):
            for handle in handles:
                client.process(read_public(handle))
        before = manager.inner_commands
        for _ in range(10):
            for handle in handles:
                client.process(read_public(handle))
        assert manager.inner_commands - before == 2 * 40  # flush and load


def test_one_greedy_client_does_not_evict_the_others() -> None:
    with managed() as manager:
        modest, greedy = manager.connect(), manager.connect()
        mine = opened(modest, load_external(1))
        handles = [opened(greedy, load_external(10 + n)) for n in range(6)]
        for _ in range(5):
            for handle in handles:
                greedy.process(read_public(handle))
            before = manager.inner_commands
            assert code(modest, read_public(mine)) == 0
            assert manager.inner_commands == before


def test_quotas_answer_as_a_full_tpm_would() -> None:
    with managed(objects=5, sessions=4) as manager:
        client, other = manager.connect(), manager.connect()
        for n in range(5):
            opened(client, load_external(n))
        assert code(client, load_external(9)) == LAYER | 0x902
        assert code(client, sequence_start()) == LAYER | 0x902
        for _ in range(4):
            opened(client, start_session())
        assert code(client, start_session()) == LAYER | 0x903
        assert code(other, load_external(9)) == 0
        assert code(other, start_session()) == 0


def test_sequences_are_never_resumed_from_an_old_state() -> None:
    chance = random.Random(7)  # noqa: S311
    with managed() as manager:
        clients = [manager.connect() for _ in range(3)]
        running = [(client, opened(client, sequence_start())) for client in clients * 4]
        parts: dict[tuple[Connection, int], bytes] = dict.fromkeys(running, b"")
        for _ in range(300):
            client, handle = key = chance.choice(running)
            data = chance.randbytes(chance.randrange(40))
            parts[key] += data
            assert code(client, sequence_update(handle, data)) == 0
        for client, handle in running:
            digest = digest_in(client.process(sequence_complete(handle)))
            assert digest == hashlib.sha256(parts[client, handle]).digest()
            assert code(client, sequence_update(handle, b"x")) == LAYER | 0x910


# -- isolation ----------------------------------------------------------------------------


def test_nobody_reaches_anothers_object() -> None:
    with managed() as manager:
        owner, other = manager.connect(), manager.connect()
        handle = opened(owner, load_external(1))
        for number in (handle, 0x80000000, 0x80000001, 0x80FFFFFF):
            assert code(other, read_public(number)) == LAYER | 0x910
            assert code(other, flush(number)) == LAYER | 0x1CB
            assert code(other, save(number)) == LAYER | 0x910
        assert listed(other.process(list_handles(0x80000000))) == []
        assert code(owner, read_public(handle)) == 0


@pytest.mark.parametrize("kind", [0x02000000, 0x03000000])
def test_nobody_reaches_anothers_session(kind: int) -> None:
    with managed() as manager:
        owner, other = manager.connect(), manager.connect()
        session = opened(owner, start_session())
        claimed = kind | session & 0xFFFFFF
        assert code(other, flush(claimed)) == LAYER | 0x1CB
        assert code(other, policy_digest(claimed)) == LAYER | 0x910
        assert code(other, save(claimed)) == LAYER | 0x910
        authorized = u32(0x40000007) + u32(9, claimed) + b"\0\0\1\0\0"
        with_session = tpm.tpm2(0x131, authorized + bytes(20), sessions=True)
        assert code(other, with_session) == LAYER | 0x918
        assert code(owner, policy_digest(session)) == 0


def test_own_session_is_flushed_by_either_kind() -> None:
    with managed() as manager:
        client = manager.connect()
        session = opened(client, start_session())
        assert code(client, flush(0x02000000 | session & 0xFFFFFF)) == 0
        assert code(client, policy_digest(session)) == LAYER | 0x910


def test_closing_leaves_nothing_behind() -> None:
    with started_engine() as engine:
        manager = Manager(engine)
        for _ in range(30):
            client = manager.connect()
            for n in range(5):
                opened(client, load_external(n))
                opened(client, start_session())
            client.close()
            client.close()
        for first in (0x80000000, 0x02000000, 0x03000000):
            assert listed(engine.process(list_handles(first))) == []


def test_what_was_left_in_the_tpm_is_flushed_at_the_start() -> None:
    with started_engine() as engine:
        for n in range(3):
            handle_of(engine.process(load_external(n)))
            session = handle_of(engine.process(start_session()))
            handle_of(engine.process(save(session))[:10] + u32(0))
        assert listed(Manager(engine).connect().process(list_handles(0x03000000))) == []
        assert listed(engine.process(list_handles(0x80000000))) == []
        assert listed(engine.process(list_handles(0x03000000))) == []


# -- contexts -----------------------------------------------------------------------------


def test_object_context_is_a_hand_over() -> None:
    with managed() as manager:
        giver, taker = manager.connect(), manager.connect()
        handle = opened(giver, load_external(3))
        context = context_in(giver.process(save(handle)))
        taken = [opened(taker, load(context)) for _ in range(4)]
        assert len(set(taken)) == 4
        name = unique_of(giver.process(read_public(handle)))
        assert {unique_of(taker.process(read_public(h))) for h in taken} == {name}


def test_session_context_is_used_up_by_who_loads_it() -> None:
    with managed() as manager:
        giver, taker = manager.connect(), manager.connect()
        session = opened(giver, start_session())
        giver.process(policy_command_code(session, 0x17B))
        digest = giver.process(policy_digest(session))
        context = context_in(giver.process(save(session)))
        assert code(giver, policy_digest(session)) == LAYER | 0x910
        assert opened(taker, load(context)) == session
        assert taker.process(policy_digest(session)) == digest
        assert code(giver, load(context)) == 0x1CB
        assert code(taker, load(context)) == 0x1CB
        newer = context_in(taker.process(save(session)))
        assert code(giver, load(context)) == 0x1CB
        assert opened(giver, load(newer)) == session


def test_damaged_contexts_are_the_tpms_to_refuse() -> None:
    with managed() as manager:
        client = manager.connect()
        context = context_in(client.process(save(opened(client, load_external(1)))))
        for position in (3, 30, len(context) - 1):
            bad = bytearray(context)
            bad[position] ^= 1
            assert code(client, load(bytes(bad))) == 0x1DF
        for size in (0, 17, 18, 100):
            assert code(client, load(context[:size])) != 0
        assert code(client, RANDOM) == 0


def test_abandoned_sessions_are_kept_within_a_bound() -> None:
    with managed() as manager:
        contexts: list[bytes] = []
        for _ in range(7):
            client = manager.connect()
            session = opened(client, start_session())
            client.process(policy_command_code(session, 0x17A + len(contexts)))
            contexts.append(context_in(client.process(save(session))))
            client.close()
        heir = manager.connect()
        assert len(listed(heir.process(list_handles(0x03000000)))) == 4
        assert [code(heir, load(context)) == 0 for context in contexts] == [False] * 3 + [True] * 4


def test_all_sessions_of_a_tpm_used_up_by_abandoned_ones() -> None:
    with managed(sessions=64, abandoned=64) as manager:
        for _ in range(64):
            client = manager.connect()
            client.process(save(opened(client, start_session())))
            client.close()
        assert code(manager.connect(), start_session()) == 0


# -- what a client is told ----------------------------------------------------------------


def properties(client: Connection, first: int, count: int) -> dict[int, int]:
    answer = client.process(tpm.tpm2(0x17A, u32(6, first, count)))
    assert tpm.code_of(answer) == 0
    words = [int.from_bytes(answer[at : at + 4], "big") for at in range(19, len(answer), 4)]
    return dict(zip(words[::2], words[1::2], strict=True))


def test_lists_show_ones_own() -> None:
    with managed() as manager:
        client, other = manager.connect(), manager.connect()
        objects = [opened(client, load_external(n)) for n in range(5)]
        sessions = [opened(client, start_session(kind)) for kind in (0, 1, 1, 3)]
        opened(other, load_external(9))
        opened(other, start_session())
        assert listed(client.process(list_handles(0x80000000))) == objects
        assert listed(client.process(list_handles(objects[2], 2))) == objects[2:4]
        assert listed(client.process(list_handles(0x02000000))) == sessions
        client.process(save(sessions[1]))
        assert listed(client.process(list_handles(0x02000000))) == [sessions[0], *sessions[2:]]
        assert listed(client.process(list_handles(0x03000000))) == [
            0x02000000 | sessions[1] & 0xFFFFFF
        ]
        assert client.process(list_handles(0x80000000, 0))[10] == 1
        assert client.process(list_handles(0x80FFFFFF))[10] == 0


def test_properties_are_ones_own() -> None:
    with managed(objects=10, sessions=8) as manager:
        client = manager.connect()
        opened(client, load_external(1))
        sessions = [opened(client, start_session()) for _ in range(3)]
        client.process(save(sessions[0]))
        found = properties(client, 0x100, 0x20) | properties(client, 0x200, 0x20)
        assert (found[0x111], found[0x114]) == (8, 0xFFFFFFFF)
        assert (found[0x203], found[0x204]) == (2, 5)
        assert (found[0x205], found[0x206], found[0x207]) == (3, 5, 9)
        assert found[0x10E] == 3


def test_unknown_commands_do_not_reach_the_tpm() -> None:
    with managed() as manager:
        client = manager.connect()
        assert code(client, tpm.tpm2(0x1F0)) == LAYER | 0x143
        assert code(client, tpm.tpm2(0x20000001)) == LAYER | 0x143


# -- ends ---------------------------------------------------------------------------------


def test_clear_by_one_client_costs_another_only_what_it_ends() -> None:
    with managed() as manager:
        owner, clearer = manager.connect(), manager.connect()
        primary = opened(owner, tpm.create_primary_rsa())
        external = opened(owner, load_external(1))
        running = opened(owner, sequence_start())
        session = opened(owner, start_session())
        owner.process(sequence_update(running, b"ab"))
        assert code(clearer, CLEAR) == 0
        for n in range(6):  # numbers are given again
            opened(clearer, load_external(50 + n))
        assert code(owner, read_public(primary)) == LAYER | 0x910
        assert code(owner, read_public(external)) == 0
        assert code(owner, policy_digest(session)) == 0
        digest = digest_in(owner.process(sequence_complete(running)))
        assert digest == hashlib.sha256(b"ab").digest()


def test_clear_alone_ends_what_it_ends() -> None:
    with managed() as manager:
        owner, clearer = manager.connect(), manager.connect()
        primary = opened(owner, tpm.create_primary_rsa())
        assert code(clearer, CLEAR) == 0
        assert code(owner, read_public(primary)) == LAYER | 0x910
        assert listed(owner.process(list_handles(0x80000000))) == []


def test_a_number_that_the_tpm_gave_again_is_not_the_former_owners() -> None:
    with started_engine() as engine:
        manager = Manager(engine)
        owner, other = manager.connect(), manager.connect()
        lost = opened(owner, load_external(1))
        assert tpm.code_of(engine.process(flush(0x80000000))) == 0  # behind the manager's back
        opened(other, load_external(2))
        assert code(owner, read_public(lost)) == LAYER | 0x910


@pytest.mark.parametrize("goes_on", [0, 1])
def test_a_session_ends_by_its_response(goes_on: int) -> None:
    """The client's attribute decides if the command succeeds; a failed one ends nothing."""
    with managed() as manager:
        client = manager.connect()
        handle = opened(client, sequence_start())
        answer = client.process(start_session(0))
        session, nonce = handle_of(answer), answer[16:]
        assert len(nonce) == 16
        parameters = b"\0\1x"
        digest = hashlib.sha256(u32(0x15C) + parameters).digest()
        proof = hmac.digest(b"", digest + bytes(16) + nonce + bytes([goes_on]), "sha256")
        for mac, answered, left in ((bytes(32), 0x9A2, [session]), (proof, 0, [session][:goes_on])):
            area = u32(session) + b"\0\x10" + bytes(16) + bytes([goes_on]) + b"\0\x20" + mac
            body = u32(handle, len(area)) + area + parameters
            assert code(client, tpm.tpm2(0x15C, body, sessions=True)) == answered
            assert listed(client.process(list_handles(0x02000000))) == left


# -- un-gapping ---------------------------------------------------------------------------


def test_without_a_manager_one_does() -> None:
    """What the next test is about: 2^16 saves, less the numbers that the TPM leaves out."""
    with started_engine() as engine:
        old, session = (handle_of(engine.process(start_session())) for _ in range(2))
        context_in(engine.process(save(old)))
        question, saves = save(session), 0
        while tpm.code_of(answer := engine.process(question)) == 0:
            saves += 1
            engine.process(load(answer[10:]))
        assert tpm.code_of(answer) == 0x901
        assert saves == 65_531


@pytest.mark.parametrize(("gap", "commands"), [(0xFFFF, 140_000), (0xFF, 6_000)])
def test_no_session_grows_too_old(gap: int, commands: int) -> None:
    with started_engine() as engine:
        below = Gapped(engine.process, gap)
        manager = Manager(below)
        idle, busy = manager.connect(), manager.connect()
        digests = {}
        for number in range(12):
            session = opened(idle, start_session())
            assert code(idle, policy_command_code(session, 0x17A + number)) == 0
            digests[session] = idle.process(policy_digest(session))
        sessions = [opened(busy, start_session()) for _ in range(5)]
        questions = [policy_digest(session) for session in sessions]
        expected = busy.process(questions[0])
        for number in range(commands):
            assert busy.process(questions[number % 5]) == expected
        assert manager.sessions.evictions > commands
        # Each idle one about once in half a gap.
        assert 0 < manager.sessions.refreshes <= 24 * (2 * commands // gap + 1)
        assert below.refused == 0
        for session, digest in digests.items():
            assert idle.process(policy_digest(session)) == digest


def test_a_context_that_a_client_holds_outlives_the_gap() -> None:
    with started_engine() as engine:
        manager = Manager(Gapped(engine.process, 0xFF))
        holder, busy = manager.connect(), manager.connect()
        session = opened(holder, start_session())
        holder.process(policy_command_code(session, 0x17B))
        digest = holder.process(policy_digest(session))
        context = context_in(holder.process(save(session)))
        sessions = [opened(busy, start_session()) for _ in range(5)]
        for number in range(2_000):
            assert code(busy, policy_digest(sessions[number % 5])) == 0
        assert opened(holder, load(context)) == session
        assert holder.process(policy_digest(session)) == digest
        assert code(holder, load(context)) == 0x1CB


def test_what_leaves_with_the_state_is_what_loads_without_the_manager() -> None:
    with started_engine() as engine:
        below = Gapped(engine.process, 0xFF)
        manager = Manager(below)
        holder, busy = manager.connect(), manager.connect()
        old = opened(holder, start_session())
        outdated = context_in(holder.process(save(old)))
        sessions = [opened(busy, start_session()) for _ in range(5)]
        for number in range(2_000):
            assert code(busy, policy_digest(sessions[number % 5])) == 0
        new = opened(holder, start_session())
        context = context_in(holder.process(save(new)))
        manager.drop()
        assert listed(below.process(list_handles(0x02000000))) == []
        assert listed(below.process(list_handles(0x03000000))) == [0x02000000 | new & 0xFF]
        assert tpm.code_of(below.process(load(outdated))) == 0x1CB
        assert handle_of(below.process(load(context))) == new


def test_a_session_that_nobody_can_refresh_costs_the_others_nothing() -> None:
    """It was saved before this manager's time, and nobody loads it."""
    with started_engine() as engine:
        below = Gapped(engine.process, 0xFF)
        stale = handle_of(below.process(start_session()))
        assert tpm.code_of(below.process(save(stale))) == 0
        manager = Manager(below)
        manager.reset(resumed=True)
        busy = manager.connect()
        sessions = [opened(busy, start_session()) for _ in range(5)]
        for number in range(1_000):
            assert code(busy, policy_digest(sessions[number % 5])) == 0
        assert listed(busy.process(list_handles(0x03000000))) == []


# -- malformed ----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_malformed_commands_cross_no_border(seed: int) -> None:
    """Whatever a client sends, another one's objects and sessions are as they were."""
    chance = random.Random(seed)  # noqa: S311
    with managed() as manager:
        victim, attacker = manager.connect(), manager.connect()
        objects = [opened(victim, load_external(n)) for n in range(2)]
        session = opened(victim, start_session())
        victim.process(policy_command_code(session, 0x17B))
        before = [victim.process(read_public(handle)) for handle in objects]
        digest = victim.process(policy_digest(session))
        own = [opened(attacker, load_external(20)), opened(attacker, start_session())]
        good = [
            read_public(own[0]),
            sequence_update(own[0], b"x"),
            flush(own[1]),
            save(own[1]),
            start_session(),
            list_handles(0x80000000),
            policy_digest(own[1]),
            load(bytes(30)),
        ]
        for _ in range(200):
            command = bytearray(chance.choice(good))
            for _ in range(chance.randrange(4)):
                command[chance.randrange(10, len(command))] = chance.choice((0, 1, 2, 3, 0x80, 255))
            if chance.random() < 0.3:
                command = command[: chance.randrange(len(command))]
            if len(command) >= 6 and chance.random() < 0.7:
                command[2:6] = len(command).to_bytes(4, "big")
            answer = attacker.process(bytes(command))
            assert len(answer) == int.from_bytes(answer[2:6], "big") >= 10
        assert [victim.process(read_public(handle)) for handle in objects] == before
        assert victim.process(policy_digest(session)) == digest
