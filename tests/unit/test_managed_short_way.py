"""The short way to a managed TPM: equal to the long one, or not taken."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support import commands as tpm
from tests.support import managed as m
from tests.support.suspension import Host, prepared, started
from vtpm_cuse.vtpm.clients import Peer
from vtpm_cuse.vtpm.managed import ManagedVtpm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vtpm_cuse.vtpm.clients import Client

    Change = Callable[[bytes], bytes]


class World:
    """A manager on the real library, with two clients that each have a key."""

    def __init__(self, host: Host) -> None:
        self.vtpm = host.vtpm
        self.managed = ManagedVtpm(host.vtpm)
        self.one, self.other = (self.managed.connect(Peer("device")) for _ in range(2))
        self.keys = {client: self.load(client, number) for number, client in enumerate(self.both)}

    @property
    def both(self) -> tuple[Client, Client]:
        return self.one, self.other

    def load(self, client: Client, number: int) -> int:
        handle = m.handle_of(self.managed.process(client, m.load_external(number)))
        self.managed.process(client, m.read_public(handle))
        return handle

    def short(self, client: Client, command: bytes) -> bytes | None:
        return self.managed.process_known(client, command)


@pytest.fixture(scope="module")
def blobs() -> dict[str, bytes]:
    return prepared()


@pytest.fixture
def world(blobs: dict[str, bytes]) -> Iterator[World]:
    with started(blobs) as host:
        yield World(host)


def test_is_equal_for_each_client(world: World) -> None:
    """Both have the same handle, of another key each."""
    answers = set()
    for client in world.both:
        command = m.read_public(world.keys[client])
        before = client.connection.commands
        answer = world.short(client, command)
        assert client.connection.commands == before + 1
        assert answer == world.managed.process(client, command)
        answers.add(answer)
    assert len(answers) == 2
    assert None not in answers


def crowded(world: World) -> bytes:
    """Takes the room of the other's key; the command that needs it."""
    for number in range(2, 6):
        world.load(world.other, number)
    return m.read_public(world.keys[world.other])


def test_loads_what_had_to_make_room(world: World) -> None:
    """Nothing is saved again that has been: another goes, it is loaded, and used."""
    command = m.read_public(world.keys[world.other])
    expected = world.short(world.other, command)
    assert expected is not None
    keys = [command, *(m.read_public(world.load(world.other, number)) for number in range(2, 6))]
    answers = [world.managed.process(world.other, key) for key in keys]
    before = world.vtpm.commands
    assert [world.short(world.other, key) for key in keys] == answers
    assert answers[0] == expected
    assert world.vtpm.commands == before + 3 * len(keys)


def test_loads_nothing_for_what_it_does_not_take(world: World) -> None:
    command = crowded(world)
    before = world.vtpm.commands
    longer = tpm.tpm2(0x173, command[10:] + b"x")
    assert world.short(world.other, longer) is None
    world.vtpm.release_storage()
    assert world.short(world.other, command) is None
    assert world.vtpm.commands == before


def test_is_not_taken_for_what_cannot_be_loaded(world: World) -> None:
    """The general way says so, and that it has ended."""
    command = crowded(world)
    objects, key = world.other.connection.objects, world.keys[world.other]
    found = objects[key]
    assert found.context is not None
    found.context = found.context[:-1] + bytes([found.context[-1] ^ 1])
    assert world.short(world.other, command) is None
    assert tpm.code_of(world.managed.process(world.other, command)) == 0xB0910
    assert key not in objects


def test_is_not_taken_for_what_is_not_the_clients(world: World) -> None:
    second = world.load(world.other, 2)
    assert second != world.keys[world.one]
    assert world.short(world.other, m.read_public(second)) is not None
    assert world.short(world.one, m.read_public(second)) is None
    session = m.handle_of(world.managed.process(world.other, m.start_session(1)))
    policy = tpm.tpm2(0x189, m.u32(session))  # PolicyGetDigest
    assert tpm.code_of(world.managed.process(world.other, policy)) == 0
    assert world.short(world.other, policy) is not None
    assert world.short(world.one, policy) is None


def test_is_not_taken_after_a_reset(world: World) -> None:
    commands = (m.read_public(world.keys[world.one]), tpm.get_random(8))
    for command in commands:
        world.managed.process(world.one, command)
        assert world.short(world.one, command) is not None
    world.vtpm.start()
    assert [world.short(world.one, command) for command in commands] == [None, None]
    assert tpm.code_of(world.vtpm.process(tpm.TPM2_STARTUP_CLEAR)) == 0
    world.vtpm.process(commands[1])
    assert world.short(world.one, commands[0]) is None
    assert tpm.code_of(world.managed.process(world.one, commands[0])) != 0


@pytest.mark.parametrize(
    "change",
    [
        lambda command: command[:-1],
        lambda command: command + b"\0",
        lambda command: b"\x80\2" + command[2:],
        lambda command: command[:9],
        lambda command: b"",
    ],
)
def test_is_not_taken_for_what_is_not_a_whole_command(world: World, change: Change) -> None:
    for command in (m.read_public(world.keys[world.one]), tpm.get_random(8)):
        world.managed.process(world.one, command)
        assert world.short(world.one, command) is not None
        assert world.short(world.one, change(command)) is None


def test_is_not_taken_for_what_fails(world: World) -> None:
    """The general way says what to make of it."""
    command = tpm.tpm2(0x17E, bytes(4) + b"\xff\xff")  # PCR_Read of a cut list
    assert tpm.code_of(world.managed.process(world.one, command)) != 0
    assert world.short(world.one, command) is None
