"""The resource manager's clients when the TPM below loses power, and is started again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

from tests.support import commands as tpm
from tests.support.managed import (
    Gapped,
    context_in,
    handle_of,
    list_handles,
    listed,
    load,
    load_external,
    opened,
    policy_command_code,
    policy_digest,
    read_public,
    save,
    start_session,
    started_engine,
)
from tests.support.suspension import Host, prepared
from vtpm_cuse.resmgr import view
from vtpm_cuse.resmgr.manager import Connection, Manager
from vtpm_cuse.resmgr.quota import Limits
from vtpm_cuse.vtpm.clients import Peer
from vtpm_cuse.vtpm.managed import ManagedVtpm

if TYPE_CHECKING:
    from vtpm_cuse.engine.libtpms import LibtpmsEngine

LAYER: Final = 0x000B0000
RANDOM: Final = tpm.get_random(8)


def code(connection: Connection, command: bytes) -> int:
    return tpm.code_of(connection.process(command))


def test_a_reset_ends_everything_and_nothing_else() -> None:
    with started_engine() as engine:
        manager = Manager(engine)
        client = manager.connect()
        handle = opened(client, load_external(1))
        session = opened(client, start_session())
        engine.stop()
        engine.start()
        manager.reset()
        assert code(client, RANDOM) == 0x100  # not started yet
        assert code(client, bytes.fromhex("80010000000c000001440000")) == 0
        assert code(client, read_public(handle)) == LAYER | 0x910
        assert code(client, policy_digest(session)) == LAYER | 0x910
        assert code(client, load_external(2)) == 0


def test_a_shutdown_with_sessions_open_and_the_resume() -> None:
    """Whatever is swapped out, nothing of the manager's comes between the shutdown and the end."""
    with started_engine() as engine:
        manager = Manager(engine)
        client, other = manager.connect(), manager.connect()
        keys = [opened(client, load_external(number)) for number in range(5)]
        context = context_in(client.process(save(keys[0])))
        sessions = [opened(client, start_session(kind)) for kind in (0, 1, 1, 3, 0)]
        assert code(client, policy_command_code(sessions[1], 0x17B)) == 0
        opened(other, start_session())
        assert code(client, tpm.pcr_extend(10, bytes(32))) == 0
        extended = tpm.pcr_value(client.process(tpm.pcr_read(10)))
        assert code(client, tpm.TPM2_SHUTDOWN_STATE) == 0
        before = manager.inner_commands
        assert code(client, RANDOM) == 0
        assert listed(client.process(list_handles(0x02000000))) == sorted(
            sessions, key=lambda handle: handle & 0xFF
        )
        assert manager.inner_commands == before
        other.close()  # which may end what it has: that takes nothing back
        engine.stop()
        engine.start()
        manager.reset()
        assert code(client, tpm.TPM2_STARTUP_STATE) == 0
        assert tpm.pcr_value(client.process(tpm.pcr_read(10))) == extended
        assert [code(client, policy_digest(one)) for one in sessions] == [LAYER | 0x910] * 5
        assert [code(client, read_public(key)) for key in keys] == [LAYER | 0x910] * 5
        assert code(client, load(context)) == 0
        for kind in (0, 1, 1, 3, 0):
            opened(client, start_session(kind))


def restarted(engine: LibtpmsEngine, manager: Manager, *commands: bytes) -> None:
    """The TPM loses power between the first of *commands* and the last, TPM2_Startup."""
    *before, startup = commands
    for command in before:
        assert tpm.code_of(engine.process(command)) == 0
    engine.stop()
    engine.start()
    manager.reset()
    assert code(manager.connect(), startup) == 0


IN_ORDER: Final = [
    (tpm.TPM2_SHUTDOWN_STATE, tpm.TPM2_STARTUP_STATE),
    (tpm.TPM2_SHUTDOWN_STATE, tpm.TPM2_STARTUP_CLEAR),
]
RESETS: Final = [(tpm.TPM2_SHUTDOWN_CLEAR, tpm.TPM2_STARTUP_CLEAR), (tpm.TPM2_STARTUP_CLEAR,)]


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("commands", [*IN_ORDER, *RESETS])
def test_a_saved_session_outlives_what_a_tpm_lets_it_outlive(
    commands: tuple[bytes, ...], *, alone: bool
) -> None:
    """As the TPM has it: not a TPM Reset, nor what was loaded, be it swapped out."""
    with started_engine() as engine:
        below = Gapped(engine.process, 0xFF)
        manager = Manager(below, alone=alone)
        holder, gone, busy = (manager.connect() for _ in range(3))
        kept: dict[bytes, tuple[int, bytes]] = {}
        for number, client in enumerate((holder, gone)):
            session = opened(client, start_session())
            client.process(policy_command_code(session, 0x17A + number))
            digest = client.process(policy_digest(session))
            kept[context_in(client.process(save(session)))] = session, digest
        gone.close()
        loaded = [opened(busy, start_session()) for _ in range(5)]
        for number in range(1_000):  # which has the others' contexts refreshed
            assert code(busy, policy_digest(loaded[number % 5])) == 0
        assert manager.sessions.refreshes > 0
        restarted(engine, manager, *commands)
        lives = commands in IN_ORDER
        assert [code(busy, policy_digest(one)) for one in loaded] == [LAYER | 0x910] * 5
        there = [0x02000000 | one & 0xFFFFFF for one, _ in kept.values()] if lives else []
        assert listed(holder.process(list_handles(0x03000000))) == there
        assert listed(below.process(list_handles(0x03000000))) == there
        for context, (session, digest) in kept.items():
            answer = holder.process(load(context))
            if lives:
                assert handle_of(answer) == session
                assert holder.process(policy_digest(session)) == digest
                assert code(holder, load(context)) == 0x1CB
            else:
                assert tpm.code_of(answer) == 0x1DF


def test_a_session_of_who_went_while_the_tpm_was_off_is_counted() -> None:
    with started_engine() as engine:
        manager = Manager(engine, limits=Limits(abandoned=2), alone=False)
        clients = [manager.connect() for _ in range(4)]
        for client in clients:
            context_in(client.process(save(opened(client, start_session()))))
            opened(client, start_session())  # one of which is swapped out
        assert tpm.code_of(engine.process(tpm.TPM2_SHUTDOWN_STATE)) == 0
        engine.stop()
        engine.start()
        manager.reset()
        for client in clients:
            client.close()
        assert len(view.sessions_of(manager, None)) == 4  # the TPM ends none now
        heir = manager.connect()
        assert code(heir, tpm.TPM2_STARTUP_STATE) == 0
        assert len(listed(heir.process(list_handles(0x03000000)))) == 2
        assert len(listed(engine.process(list_handles(0x03000000)))) == 2


def test_others_sessions_stay_theirs_over_a_restart() -> None:
    """Of who uses the TPM beside the manager."""
    with started_engine() as engine:
        manager = Manager(engine, alone=False)
        client = manager.connect()
        assert code(client, RANDOM) == 0
        context = context_in(engine.process(save(handle_of(engine.process(start_session())))))
        restarted(engine, manager, *IN_ORDER[0])
        assert code(client, policy_digest(opened(client, start_session()))) == 0
        assert tpm.code_of(engine.process(load(context))) == 0


@pytest.mark.parametrize(
    ("last", "resumes"),
    [(tpm.TPM2_SHUTDOWN_CLEAR, False), (tpm.TPM2_SHUTDOWN_STATE, True), (RANDOM, True)],
)
def test_the_managers_own_commands_are_no_clients_last(last: bytes, *, resumes: bool) -> None:
    """Which decides on the shutdown in order that a reset begins with."""
    host = Host(prepared())
    host.vtpm.start()
    assert tpm.code_of(host.vtpm.process(tpm.TPM2_STARTUP_CLEAR)) == 0
    managed = ManagedVtpm(host.vtpm)
    one, other = managed.connect(Peer("device")), managed.connect(Peer("device"))
    for number in range(5):
        assert tpm.code_of(managed.process(other, load_external(number))) == 0
    assert tpm.code_of(managed.process(one, last)) == 0
    before = host.vtpm.commands
    managed.close(other)
    assert host.vtpm.commands > before
    host.vtpm.start()
    code = tpm.code_of(managed.process(one, tpm.TPM2_STARTUP_STATE))
    assert code == (0 if resumes else 0x1C4)
    host.close()
