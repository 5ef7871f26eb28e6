"""The TPM's own client, past the resource manager: it ends what it likes, and what it has is its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support import commands as tpm
from tests.support import managed as m
from tests.support.commands import code_of
from tests.support.suspension import Host, prepared, started
from vtpm_cuse.resmgr.commands import commands
from vtpm_cuse.resmgr.inner import Inner
from vtpm_cuse.vtpm.clients import Peer
from vtpm_cuse.vtpm.managed import ManagedVtpm
from vtpm_cuse.wire.tpm2_handles import HANDLE_GIVERS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Process = Callable[[bytes], bytes]

CLEAR = tpm.tpm2(0x126, m.u32(0x4000000C) + m.PASSWORD, sessions=True)
PRIMARY = tpm.create_primary_rsa(bits=1024)


class World:
    """A TPM with its own client, and one of the manager's; both by the shorter way where they can."""

    def __init__(self, host: Host) -> None:
        self._vtpm = host.vtpm
        self._managed = ManagedVtpm(host.vtpm)
        self._managed.begin()
        self._managed.share()
        self._client = self._managed.connect(Peer("device"))

    def past(self, command: bytes) -> bytes:
        return self._vtpm.process_known(command) or self._vtpm.process(command)

    def managed(self, command: bytes) -> bytes:
        known = self._managed.process_known(self._client, command)
        return known or self._managed.process(self._client, command)


@pytest.fixture(scope="module")
def blobs() -> dict[str, bytes]:
    return prepared()


@pytest.fixture
def world(blobs: dict[str, bytes]) -> Iterator[World]:
    with started(blobs) as host:
        yield World(host)


@pytest.mark.parametrize("is_known", [False, True])
def test_a_number_of_an_object_that_it_has_ended(world: World, *, is_known: bool) -> None:
    if is_known:  # all headers have been seen
        for process in (world.past, world.managed):
            assert code_of(process(m.read_public(m.handle_of(process(m.load_external(9)))))) == 0
            assert code_of(process(m.flush(m.listed(process(m.list_handles(0x80000000)))[0]))) == 0
    lost = m.handle_of(world.managed(m.load_external(1)))
    assert code_of(world.managed(m.read_public(lost))) == 0
    (number,) = m.listed(world.past(m.list_handles(0x80000000)))
    assert code_of(world.past(m.flush(number))) == 0
    assert m.handle_of(world.past(m.load_external(2))) == number
    if is_known:
        assert code_of(world.managed(m.read_public(lost))) == 0xB0910
    assert code_of(world.managed(m.flush(lost))) == (0xB01CB if is_known else 0)
    assert code_of(world.past(m.read_public(number))) == 0


def test_a_number_of_an_object_that_its_clear_has_ended(world: World) -> None:
    lost = m.handle_of(world.managed(PRIMARY))
    assert code_of(world.past(CLEAR)) == 0
    assert m.handle_of(world.past(PRIMARY))
    assert code_of(world.managed(m.read_public(lost))) == 0xB0910


@pytest.mark.parametrize("is_saved", [False, True])
def test_a_number_of_a_session_that_it_has_ended(world: World, *, is_saved: bool) -> None:
    lost = m.handle_of(world.managed(m.start_session()))
    assert code_of(world.managed(m.policy_digest(lost))) == 0
    assert code_of(world.past(m.flush(lost))) == 0
    assert m.handle_of(world.past(m.start_session())) == lost
    if is_saved:
        context = m.context_in(world.past(m.save(lost)))
        assert m.handle_of(world.past(m.load(context))) == lost
    for command in (m.policy_digest(lost), m.save(lost)):
        assert code_of(world.managed(command)) == 0xB0910
    assert code_of(world.managed(m.flush(lost))) == 0xB01CB
    assert code_of(world.past(m.policy_digest(lost))) == 0


def test_it_loads_a_session_that_a_client_has_saved(world: World) -> None:
    lost = m.handle_of(world.managed(m.start_session()))
    context = m.context_in(world.managed(m.save(lost)))
    assert m.handle_of(world.past(m.load(context))) == lost
    assert code_of(world.managed(m.flush(lost))) == 0xB01CB
    assert code_of(world.past(m.policy_digest(lost))) == 0


def test_the_tpm_itself_says_which_commands_give_a_handle() -> None:
    with m.started_engine() as engine:
        known = commands(Inner(engine.process).commands()).attributes
    givers = {code.to_bytes(4, "big") for code, one in known.items() if one.returns_handle}
    assert givers == HANDLE_GIVERS
