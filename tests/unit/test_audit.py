"""An exclusive audit session: no question of ours, and no work of the manager's, ends it."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

import pytest

from tests.support import commands as tpm
from tests.support import managed as m
from tests.support.auditor import AUDIT, EXCLUSIVE, Auditor
from tests.support.suspension import Host, prepared, started
from tests.support.vectors import STATE
from vtpm_cuse.errors import DeviceError
from vtpm_cuse.vtpm import audit
from vtpm_cuse.vtpm.clients import Peer
from vtpm_cuse.vtpm.managed import ManagedVtpm
from vtpm_cuse.wire import tpm2_handles as wire
from vtpm_cuse.wire import volatile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vtpm_cuse.vtpm.vtpm import Vtpm

    Process = Callable[[bytes], bytes]

QUESTION: Final = tpm.pcr_read(16)


@pytest.fixture(scope="module")
def blobs() -> dict[str, bytes]:
    return prepared()


@pytest.fixture
def host(blobs: dict[str, bytes]) -> Iterator[Host]:
    with started(blobs) as found:
        yield found


def ask(vtpm: Vtpm) -> int:
    """As the folder of a FUSE mount does; 0, or the error."""
    try:
        return tpm.code_of(vtpm.query(QUESTION))
    except DeviceError as exc:
        return exc.errno


def clients(vtpm: Vtpm) -> Iterator[Process]:
    """One of the TPM's own device, and one of a resource manager."""
    yield vtpm.process
    managed = ManagedVtpm(vtpm)
    client = managed.connect(Peer("device"))
    yield lambda command: managed.process(client, command)


def test_a_question_waits_for_the_end_of_it(host: Host) -> None:
    for process in clients(host.vtpm):
        auditor = Auditor(process)
        assert ask(host.vtpm) == 0
        assert auditor.is_exclusive
        assert ask(host.vtpm) == errno.EBUSY
        assert auditor.is_exclusive
        process(tpm.get_random(8))
        assert ask(host.vtpm) == 0


def test_beside_other_sessions_and_handles(host: Host) -> None:
    for process in clients(host.vtpm):
        auditor = Auditor(process)
        for pcr in (9, 16):  # 9 is a size that an authorization area can have
            extend = m.u32(1) + b"\0\x0b" + bytes(32)
            attributes = auditor.audit(
                code=0x182, handles=m.u32(pcr), before=m.PASSWORD[4:], parameters=extend
            )
            assert attributes & EXCLUSIVE
            assert ask(host.vtpm) == errno.EBUSY
            assert auditor.is_exclusive
        process(m.flush(auditor.handle))
        assert ask(host.vtpm) == 0


def test_what_leaves_it_exclusive_leaves_questions_out(host: Host) -> None:
    """A command that fails, and those on contexts; of flushes, all but its own."""
    for process in clients(host.vtpm):
        auditor, other = Auditor(process), m.handle_of(process(m.start_session()))
        key = m.handle_of(process(m.load_external(1)))
        assert auditor.is_exclusive
        steps = [m.read_public(0x80FFFF00), m.save(key), m.flush(key), m.flush(other)]
        for step in steps:
            process(step)
            assert ask(host.vtpm) == errno.EBUSY
        context = process(m.save(auditor.handle))[10:]
        assert ask(host.vtpm) == errno.EBUSY
        process(m.load(context))
        assert ask(host.vtpm) == errno.EBUSY
        assert auditor.is_exclusive
        process(m.flush(auditor.handle & 0xFFFFFF | 0x03000000))  # the TPM takes either kind
        assert ask(host.vtpm) == 0


def test_it_ends_with_its_session_and_with_another(host: Host) -> None:
    for process in clients(host.vtpm):
        auditor = Auditor(process)
        assert auditor.is_exclusive
        auditor.audit(attributes=AUDIT)
        assert ask(host.vtpm) == 0
        first, second = Auditor(process), Auditor(process)
        assert first.is_exclusive
        assert second.is_exclusive
        process(m.flush(first.handle))
        assert ask(host.vtpm) == errno.EBUSY
        process(m.flush(second.handle))
        assert ask(host.vtpm) == 0


def test_a_closed_client_keeps_no_question_out(host: Host) -> None:
    managed = ManagedVtpm(host.vtpm)
    client = managed.connect(Peer("device"))
    assert Auditor(lambda command: managed.process(client, command)).is_exclusive
    assert ask(host.vtpm) == errno.EBUSY
    managed.close(client)
    assert ask(host.vtpm) == 0


def test_neither_swaps_nor_an_audited_clear_end_it(host: Host) -> None:
    managed = ManagedVtpm(host.vtpm)
    client = managed.connect(Peer("device"))

    def process(command: bytes) -> bytes:
        return managed.process(client, command)

    primary = m.handle_of(process(tpm.create_primary_rsa(bits=1024)))
    keys = [m.handle_of(process(m.load_external(number))) for number in range(5)]
    auditor = Auditor(process)
    assert auditor.is_exclusive
    for key in keys:
        process(m.save(key))
    assert auditor.is_exclusive
    cleared = auditor.audit(
        code=0x126, handles=m.u32(0x4000000C), before=m.PASSWORD[4:], parameters=b""
    )
    assert cleared & EXCLUSIVE
    assert auditor.is_exclusive
    assert tpm.code_of(process(m.read_public(primary))) == 0xB0910
    assert tpm.code_of(process(m.read_public(keys[0]))) == 0


def test_an_audited_list_is_the_tpms_own(host: Host) -> None:
    """What is signed cannot be the manager's; a password signs nothing, and is refused."""
    *_, process = clients(host.vtpm)
    keys = [m.handle_of(process(m.load_external(number))) for number in range(4)]
    auditor, question = Auditor(process), m.u32(1, 0x80000000, 254)
    assert auditor.audit(code=0x17A, parameters=question) & EXCLUSIVE
    assert m.listed(process(tpm.tpm2(0x17A, question))) == keys
    assert tpm.code_of(process(tpm.tpm2(0x17A, m.PASSWORD + question, sessions=True))) == 0x98B


@pytest.mark.parametrize("first", ["manager", "TPM2_Startup"])
def test_what_the_manager_asks_first_ends_none(blobs: dict[str, bytes], first: str) -> None:
    """It asks when the TPM is started, before anybody can have such a session."""
    host = Host(blobs)
    host.vtpm.start()
    managed = ManagedVtpm(host.vtpm) if first == "manager" else None
    assert tpm.code_of(host.vtpm.process(tpm.TPM2_STARTUP_CLEAR)) == 0
    if managed is None:
        managed = ManagedVtpm(host.vtpm)
        managed.begin()
    managed.share()
    client = managed.connect(Peer("device"))
    auditor = Auditor(host.vtpm.process)
    assert auditor.is_exclusive
    managed.begin()
    for refused in (m.read_public(0x80000000), m.flush(0x80000000), m.load(bytes(30))):
        assert tpm.code_of(managed.process(client, refused)) != 0
    assert m.listed(managed.process(client, m.list_handles(0x80000000))) == []
    assert auditor.is_exclusive
    assert tpm.code_of(managed.process(client, m.load_external(1))) == 0
    assert not auditor.audit() & EXCLUSIVE
    host.close()


def test_it_outlives_a_suspension_and_a_reset_ends_it(host: Host) -> None:
    auditor = Auditor(lambda command: host.vtpm.process(command))
    assert auditor.is_exclusive
    host.renew()
    assert ask(host.vtpm) == errno.EBUSY
    assert auditor.is_exclusive
    host.vtpm.start()
    assert ask(host.vtpm) == 0x100  # the TPM has it: it is not started


def moved(host: Host) -> None:
    """The TPM goes on from what is stored of it."""
    host.vtpm.store_volatile()
    host.vtpm.start()
    assert host.vtpm.resumed


def test_a_state_from_elsewhere_says_which_it_has(host: Host) -> None:
    auditor = Auditor(host.vtpm.process)
    moved(host)
    assert ask(host.vtpm) == 0
    assert auditor.is_exclusive
    moved(host)
    assert ask(host.vtpm) == errno.EBUSY
    host.vtpm.process(m.flush(auditor.handle ^ 1))  # of which there is none
    assert ask(host.vtpm) == errno.EBUSY
    assert auditor.is_exclusive
    host.vtpm.process(tpm.get_random(8))
    assert ask(host.vtpm) == 0


@pytest.mark.parametrize("is_managed", [False, True])
@pytest.mark.parametrize("begun_before", [False, True])
def test_what_a_manager_asks_of_a_state_from_elsewhere_ends_none(
    host: Host, *, is_managed: bool, begun_before: bool
) -> None:
    """Not one of the TPM's own client, nor one that a client has saved, and loads there."""
    managed = ManagedVtpm(host.vtpm)
    client = managed.connect(Peer("device"))
    auditor = Auditor(
        (lambda command: managed.process(client, command)) if is_managed else host.vtpm.process
    )
    assert auditor.is_exclusive
    context = auditor.process(m.save(auditor.handle))[10:] if is_managed else b""
    established = host.vtpm.established()
    if not begun_before:
        host.vtpm.on_startup = lambda: None  # there is no manager yet
    moved(host)
    if not begun_before:
        managed = ManagedVtpm(host.vtpm)
        managed.begin()
        client = managed.connect(Peer("device"))
    if is_managed:
        assert tpm.code_of(auditor.process(m.load(context))) == 0
    else:
        managed.share()
        assert tpm.code_of(managed.process(client, m.read_public(0x80000000))) == 0xB0910
    assert auditor.is_exclusive
    assert host.vtpm.established() == established
    managed.begin()
    assert auditor.is_exclusive
    assert ask(host.vtpm) == errno.EBUSY
    assert tpm.code_of(managed.process(client, m.load_external(1))) == 0
    assert not auditor.audit() & EXCLUSIVE


@pytest.mark.parametrize("version", ["v0.7.1", "v0.10.2"])
def test_where_a_volatile_state_says_it(version: str) -> None:
    """Of libtpms 0.9 and 0.10; what has another form says nothing."""
    stored = (STATE / f"{version}-tpm2-dir-plain/tpm2-00.volatilestate").read_bytes()
    state = stored[stored.index(bytes.fromhex("45637889")) - 2 :]
    assert volatile.exclusive_session_in(state) == 0
    not_started = volatile.with_exclusive_session(state, 0)
    assert volatile.exclusive_session_in(not_started) == 0
    changed = volatile.with_exclusive_session(state, 0x02000005)
    assert volatile.exclusive_session_in(changed) == 0x02000005
    assert volatile.with_exclusive_session(changed, 0x40000008) == state
    other = volatile.with_exclusive_session(state, 0x80000000)
    for unknown in (b"", state[:11], b"\0" + state, other):
        assert volatile.exclusive_session_in(unknown) == wire.UNKNOWN_SESSION


def test_where_it_does_not_say_nothing_is_asked(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    managed = ManagedVtpm(host.vtpm)
    auditor = Auditor(host.vtpm.process)
    assert auditor.is_exclusive
    monkeypatch.setattr(audit, "exclusive_session_in", lambda _: wire.UNKNOWN_SESSION)
    moved(host)
    managed.begin()
    assert ask(host.vtpm) == errno.EBUSY
    assert auditor.is_exclusive


def test_answers_that_are_cut_short_name_none() -> None:
    area = m.u32(2) + bytes(2) + b"\x83" + bytes(2)
    command = tpm.tpm2(0x17B, m.u32(len(area)) + m.u32(0x02000000) + area[4:], sessions=True)
    answer = tpm.tpm2(0, m.u32(2) + b"\0\0" + b"\0\0" + b"\x83" + b"\0\0", sessions=True)
    assert wire.exclusive_audit_session(command, answer) == 0x02000000
    for size in range(len(answer) - 3):
        assert wire.exclusive_audit_session(command, answer[:size]) == 0
    for size in range(len(command)):  # of which no TPM gives such an answer
        assert wire.exclusive_audit_session(command[:size], answer) == wire.UNKNOWN_SESSION
