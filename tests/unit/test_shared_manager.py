"""A manager in front of a TPM that others use besides: here, the engine below it."""

from __future__ import annotations

import struct
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from tests.support import commands as tpm
from tests.support import managed as m
from tests.support.auditor import Auditor
from tests.support.commands import code_of
from vtpm_cuse.resmgr.shared import SharedManager

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vtpm_cuse.engine.libtpms import LibtpmsEngine
    from vtpm_cuse.resmgr.manager import Connection

FAILURE = bytes.fromhex("80010000000a000b0101")
RETRY = bytes.fromhex("80010000000a00000922")
LOADED = bytes.fromhex("80010000000e0000000080000000")
MISSING = bytes.fromhex("80010000000a00000910")


class Below:
    """The TPM below: `answer` may say something else to a command, by its code."""

    tpm2 = True

    def __init__(self, engine: LibtpmsEngine) -> None:
        self.engine = engine
        self.answer: Callable[[int], bytes | None] = lambda _: None
        self.asked: list[int] = []

    def process(self, command: bytes) -> bytes:
        code = struct.unpack_from(">I", command, 6)[0]
        self.asked.append(code)
        return self.answer(code) or self.engine.process(command)

    def cancel(self) -> int:
        return 0

    def handles(self, first: int) -> list[int]:
        """What the TPM holds, past the manager."""
        return m.listed(self.engine.process(m.list_handles(first)))

    def loaded(self) -> int:
        """Objects and sessions."""
        return len(self.handles(0x80000000)) + len(self.handles(0x02000000))

    def flush(self, handle: int) -> None:
        """By somebody else."""
        assert code_of(self.engine.process(m.flush(handle))) == 0

    def sleep(self, kind: int, *, shutdown: bool = True) -> int:
        """As the kernel has it: Shutdown(STATE), no power, Startup. Returns the code of that."""
        if shutdown:
            assert code_of(self.engine.process(tpm.TPM2_SHUTDOWN_STATE)) == 0
        self.engine.stop()
        self.engine.start()
        return code_of(self.engine.process(tpm.tpm2(0x144, struct.pack(">H", kind))))


@contextmanager
def shared(**settings: int | bool) -> Iterator[tuple[SharedManager, Below]]:
    with m.started_engine() as engine:
        below = Below(engine)
        yield SharedManager(below, **settings), below  # type: ignore[arg-type]


def code(client: Connection, command: bytes) -> int:
    return code_of(client.process(command))


# -- others end what clients have -----------------------------------------------------------


def test_an_object_that_somebody_else_ended_comes_back() -> None:
    with shared() as (manager, below):
        client = manager.connect()
        keys = [m.opened(client, m.load_external(number)) for number in range(3)]
        first = [m.unique_of(client.process(m.read_public(key))) for key in keys]
        for handle in below.handles(0x80000000):
            below.flush(handle)
        assert [m.unique_of(client.process(m.read_public(key))) for key in keys] == first


def test_one_with_a_password_comes_back() -> None:
    """The way of a command with an authorization, TPM2_Sign here."""
    with shared() as (manager, below):
        client = manager.connect()
        key = m.handle_of(client.process(tpm.create_primary_rsa()))
        digest = m.sized(bytes(32)) + struct.pack(">HHHIH", 0x14, 0xB, 0x8024, m.NULL, 0)
        sign = tpm.tpm2(0x15D, m.u32(key) + m.PASSWORD + digest, sessions=True)
        assert code(client, sign) in {0, 0x922}  # the first such use since the start
        below.flush(0x80000000)
        assert code(client, sign) == 0


def test_a_sequence_that_somebody_else_ended_is_said_to_be_gone() -> None:
    """It has no copy that would be true."""
    with shared() as (manager, below):
        client = manager.connect()
        sequence = m.opened(client, m.sequence_start())
        key = m.opened(client, m.load_external(1))
        below.flush(0x80000000)
        assert code(client, m.sequence_update(sequence, b"a")) == 0x000B0910
        assert code(client, m.read_public(key)) == 0
        assert m.listed(client.process(m.list_handles(0x80000000))) == [key]


def test_looking_for_what_is_gone_ends_no_exclusive_audit_session() -> None:
    with shared() as (manager, below):
        client, other = manager.connect(), manager.connect()
        sequence = m.opened(client, m.sequence_start())
        auditor = Auditor(other.process)
        assert auditor.is_exclusive
        below.flush(0x80000000)
        assert code(client, m.sequence_update(sequence, b"a")) == 0x000B0910
        assert auditor.is_exclusive


def test_a_session_that_somebody_else_ended_costs_no_other() -> None:
    with shared() as (manager, below):
        client, other = manager.connect(), manager.connect()
        lost, kept = m.opened(client, m.start_session()), m.opened(other, m.start_session())
        below.flush(lost)
        assert code(client, m.policy_digest(lost)) & 0xFFFF == 0x910
        assert m.listed(client.process(m.list_handles(0x02000000))) == []
        assert code(other, m.policy_digest(kept)) == 0


def test_a_tpm_that_says_so_for_ever_is_believed_in_the_end() -> None:
    with shared() as (manager, below):
        client = manager.connect()
        key = m.opened(client, m.load_external(1))

        def lie(number: int) -> bytes | None:
            """It holds nothing, and yet loads what it is given."""
            assert len(below.asked) < 100
            return {0x173: MISSING, 0x161: LOADED}.get(number)

        below.answer = lie
        assert code(client, m.read_public(key)) & 0xFFFF == 0x910
        below.answer = lambda _: None
        assert code(client, m.read_public(key)) == 0


# -- sleep ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [0, 1])
def test_what_was_taken_out_outlives_a_sleep(kind: int) -> None:
    with shared() as (manager, below):
        client = manager.connect()
        key, session = m.opened(client, m.load_external(1)), m.opened(client, m.start_session())
        assert code(client, m.policy_command_code(session, 0x15E)) == 0
        unique = m.unique_of(client.process(m.read_public(key)))
        before = client.process(m.policy_digest(session))
        manager.rest(sessions=True)
        assert below.loaded() == 0
        assert below.sleep(kind) == 0
        assert m.unique_of(client.process(m.read_public(key))) == unique
        assert client.process(m.policy_digest(session)) == before


def test_what_was_loaded_is_looked_for_after_a_sleep() -> None:
    """The objects have a copy; a session that was loaded has none."""
    with shared() as (manager, below):
        client, other = manager.connect(), manager.connect()
        key, theirs = m.opened(client, m.load_external(1)), m.opened(other, m.load_external(2))
        session = m.opened(client, m.start_session())
        uniques = [
            m.unique_of(client.process(m.read_public(key))),
            m.unique_of(other.process(m.read_public(theirs))),
        ]
        assert below.sleep(1) == 0
        assert m.unique_of(other.process(m.read_public(theirs))) == uniques[1]
        assert m.unique_of(client.process(m.read_public(key))) == uniques[0]
        assert code(client, m.policy_digest(session)) & 0xFFFF == 0x910
        assert m.opened(client, m.start_session())


def test_a_pause_after_a_sleep_costs_no_object() -> None:
    """It comes before anybody has noticed."""
    with shared() as (manager, below):
        client = manager.connect()
        key = m.opened(client, m.load_external(1))
        unique = m.unique_of(client.process(m.read_public(key)))
        assert below.sleep(1) == 0
        manager.rest(sessions=True)
        assert m.unique_of(client.process(m.read_public(key))) == unique


def test_nothing_is_saved_behind_a_shutdown() -> None:
    """A session that is would have the TPM refuse Startup(STATE)."""
    with shared() as (manager, below):
        client = manager.connect()
        key = m.opened(client, m.load_external(1))
        m.opened(client, m.start_session())
        assert code(client, tpm.TPM2_SHUTDOWN_STATE) == 0
        assert below.loaded() == 0
        m.opened(client, m.start_session())
        assert code(client, m.read_public(key)) == 0
        below.asked.clear()
        manager.rest(sessions=True)
        assert below.asked == []
        assert below.sleep(1, shutdown=False) == 0
        assert code(client, m.read_public(key)) == 0


def test_a_client_that_goes_on_after_a_shutdown_does_not_keep_the_room() -> None:
    with shared() as (manager, below):
        client = manager.connect()
        m.opened(client, m.load_external(1))
        assert code(client, tpm.TPM2_SHUTDOWN_STATE) == 0
        m.opened(client, m.load_external(2))
        manager.rest(sessions=True)
        assert below.loaded() == 0


# -- what others have -----------------------------------------------------------------------


def test_what_others_left_is_counted_and_makes_room_and_comes_back() -> None:
    """Else one who was killed, with all slots taken, would leave none to the next."""
    with shared() as (manager, below):
        theirs = [m.handle_of(below.engine.process(m.load_external(9 + n))) for n in range(3)]
        uniques = [m.unique_of(below.engine.process(m.read_public(one))) for one in theirs]
        session = m.handle_of(below.engine.process(m.start_session()))
        assert code_of(below.engine.process(m.save(session))) == 0
        loaded = [m.handle_of(below.engine.process(m.start_session(n))) for n in (0, 1, 1)]
        digest = below.engine.process(m.policy_digest(loaded[1]))
        assert manager.prepare()
        assert manager.found == (3, 4)
        client = manager.connect()
        keys = [m.opened(client, m.load_external(number)) for number in range(5)]
        mine = [m.opened(client, m.start_session()) for number in range(5)]
        assert all(code(client, m.read_public(key)) == 0 for key in keys)
        assert all(code(client, m.policy_digest(one)) == 0 for one in mine)
        assert m.listed(client.process(m.list_handles(0x80000000))) == keys
        assert code(client, m.flush(loaded[0])) == 0x000B01CB
        assert code(client, m.policy_digest(loaded[1])) == 0x000B0910
        client.close()
        manager.drop()
        assert [m.unique_of(below.engine.process(m.read_public(n))) for n in theirs] == uniques
        assert below.handles(0x80000000) == theirs
        assert sorted(below.handles(0x02000000)) == sorted(loaded)
        assert below.engine.process(m.policy_digest(loaded[1])) == digest
        assert below.handles(0x03000000) == [session & 0xFFFFFF | 0x02000000]


def test_one_that_is_in_the_way_of_all_saves_is_named() -> None:
    with m.started_engine() as engine:
        below = m.Gapped(engine.process, 0xFF)
        theirs = m.handle_of(below.process(m.start_session()))
        assert code_of(below.process(m.save(theirs))) == 0
        manager, named = SharedManager(below), list[list[int]]()
        manager.on_gap = named.append
        client = manager.connect()
        sessions = [m.opened(client, m.start_session()) for _ in range(5)]
        answers = [code(client, m.policy_digest(sessions[n % 5])) for n in range(400)]
        assert {0, 0x901} == set(answers)
        assert named == [[theirs & 0xFFFFFF | 0x02000000]]


def test_it_is_ended_at_the_start_if_so_wanted_and_never_again() -> None:
    with shared(alone=True) as (manager, below):
        below.engine.process(m.load_external(9))
        session = m.handle_of(below.engine.process(m.start_session()))
        assert code_of(below.engine.process(m.save(session))) == 0
        assert manager.prepare()
        assert manager.found == (0, 0)
        assert below.handles(0x03000000) == []
        below.engine.process(m.load_external(9))
        manager.reset()
        assert manager.prepare()
        assert below.handles(0x80000000) == [0x80000000]


def test_so_many_at_a_time_where_something_below_counts() -> None:
    most = 0
    with shared(slots=2) as (manager, below):
        client = manager.connect()
        for number in range(6):
            m.opened(client, m.load_external(number))
            m.opened(client, m.start_session())
            most = max(most, len(below.handles(0x80000000)), len(below.handles(0x02000000)))
    assert most == 2


# -- a TPM that fails -----------------------------------------------------------------------


def test_no_handle_gets_past_a_manager_that_does_not_know_the_tpm() -> None:
    with shared() as (manager, below):
        theirs = m.handle_of(below.engine.process(m.load_external(9)))
        below.answer = lambda number: FAILURE if number == 0x17A else None
        client = manager.connect()
        for foreign in (m.read_public(theirs), m.flush(theirs), m.save(theirs)):
            assert client.process(foreign) == FAILURE
        below.answer = lambda _: None
        assert below.handles(0x80000000) == [theirs]
        assert code(client, m.read_public(theirs)) == 0x000B0910


def test_a_failure_costs_the_command_and_no_object() -> None:
    with shared() as (manager, below):
        client, other = manager.connect(), manager.connect()
        keys = [m.opened(client, m.load_external(number)) for number in range(4)]
        theirs = m.opened(other, m.load_external(9))
        for failing in (0x161, 0x162, 0x165, 0x173):
            below.answer = {failing: FAILURE}.get
            for key in keys:
                assert code(client, m.read_public(key)) in {0, 0x000B0101}
            manager.rest(sessions=True)
            below.answer = lambda _: None
        for key in keys:
            assert code(client, m.read_public(key)) == 0
        assert code(other, m.read_public(theirs)) == 0


def test_what_the_manager_asks_is_asked_again() -> None:
    """TPM_RC_RETRY, to every other of its commands."""
    with shared() as (manager, below):
        client = manager.connect()
        m.opened(client, m.load_external(0))  # it knows the TPM
        turn = {"now": False}

        def retry(number: int) -> bytes | None:
            if number not in {0x161, 0x162, 0x165}:
                return None
            turn["now"] = not turn["now"]
            return RETRY if turn["now"] else None

        below.answer = retry
        keys = [m.opened(client, m.load_external(number)) for number in range(1, 9)]
        assert all(code(client, m.read_public(key)) == 0 for key in keys)
