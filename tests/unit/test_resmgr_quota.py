"""How many sessions a client, a user and all may have: who takes all of his keeps out nobody else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from tests.support import commands as tpm
from tests.support import managed as m
from vtpm_cuse.resmgr.manager import Connection, Manager

if TYPE_CHECKING:
    from vtpm_cuse.engine.libtpms import LibtpmsEngine

OWN_FULL, ALL_FULL = 0xB0903, 0xB0905
OF_A_CLIENT: Final = 16
OF_A_USER: Final = 46
OF_ALL: Final = 62
GREEDY, MODEST = 1000, 1001


def code(connection: Connection, command: bytes) -> int:
    return tpm.code_of(connection.process(command))


def filled(manager: Manager, user: int | None, count: int) -> list[Connection]:
    """A user's connections, which have so many sessions."""
    there = [manager.connect(user) for _ in range(-(-count // OF_A_CLIENT))]
    for number in range(count):
        m.opened(there[number // OF_A_CLIENT], m.start_session())
    return there


def left_of(client: Connection) -> int:
    """TPM_PT_HR_ACTIVE_AVAIL."""
    answer = client.process(tpm.tpm2(0x17A, m.u32(6, 0x206, 1)))
    return int.from_bytes(answer[-4:], "big")


def test_a_user_with_many_clients_keeps_out_nobody_else() -> None:
    with m.managed() as manager:
        for client in filled(manager, GREEDY, OF_A_USER)[:2]:
            assert code(client, m.start_session()) == OWN_FULL
        another = manager.connect(GREEDY)
        assert left_of(another) == 0
        assert code(another, m.start_session()) == ALL_FULL
        (client,) = filled(manager, MODEST, OF_A_CLIENT)
        assert code(client, m.start_session()) == OWN_FULL
        another.close()
        third = manager.connect(1002)
        assert code(third, m.start_session()) == ALL_FULL
        client.close()
        assert left_of(third) == OF_A_CLIENT
        assert code(third, m.start_session()) == 0


def test_there_is_room_for_who_uses_the_tpm_past_the_manager() -> None:
    with m.started_engine() as engine:
        manager = Manager(engine)
        filled(manager, GREEDY, OF_A_USER)
        filled(manager, MODEST, OF_ALL - OF_A_USER)
        answers = [tpm.code_of(raw_session(engine)) for _ in range(3)]
        assert answers == [0, 0, 0x905]


def raw_session(engine: LibtpmsEngine) -> bytes:
    """One of the TPM's own client's, which puts another out of the way."""
    m.context_in(engine.process(m.save(m.listed(engine.process(m.list_handles(0x02000000)))[0])))
    return engine.process(m.start_session())


def test_what_others_have_taken_is_the_managers_to_refuse() -> None:
    """Who uses the TPM past it has most sessions: first those go that clients left."""
    with m.started_engine() as engine:
        manager = Manager(engine, alone=False)
        gone = manager.connect()
        assert code(gone, m.save(m.opened(gone, m.start_session()))) == 0
        gone.close()
        client = manager.connect()
        for _ in range(63):
            m.context_in(engine.process(m.save(m.handle_of(engine.process(m.start_session())))))
        assert tpm.code_of(engine.process(m.start_session())) == 0x905
        assert m.handle_of(client.process(m.start_session()))
        assert code(client, m.start_session()) == ALL_FULL


def test_a_session_that_another_has_saved_is_taken_within_the_limits() -> None:
    with m.managed() as manager:
        giver = filled(manager, MODEST, 1)[0]
        (session,) = m.listed(giver.process(m.list_handles(0x02000000)))
        context = m.context_in(giver.process(m.save(session)))
        own = filled(manager, GREEDY, OF_A_USER)[0]
        taker = manager.connect(GREEDY)
        assert code(taker, m.load(context)) == ALL_FULL
        assert m.opened(giver, m.load(context)) == session  # it was not used up
        (first, *_) = m.listed(own.process(m.list_handles(0x02000000)))
        assert m.opened(taker, m.load(m.context_in(own.process(m.save(first))))) == first
