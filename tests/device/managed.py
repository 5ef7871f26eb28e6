"""Clients of a resource manager: each has a TPM 2.0 of its own, whatever the others do."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import struct
import subprocess
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Protocol, Self, TypeVar

from tests.support import managed as m
from tests.support.commands import code_of, create_primary_rsa, get_random, tpm2
from tests.support.waiting import PATIENCE_SECONDS, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

OBJECTS = 64
SESSIONS = 16
SESSIONS_OF_A_USER = 46


class Client(Protocol):
    """A connection, or an open of a device."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...
    def send(self, data: bytes) -> None: ...
    def response(self) -> bytes: ...
    def command(self, command: bytes) -> bytes: ...


SomeClient = TypeVar("SomeClient", bound=Client, covariant=True)


class World(Protocol[SomeClient]):
    """A TPM that is on and started, and the ways to it."""

    def client(self) -> SomeClient:
        """One of the resource manager's."""

    def raw(self) -> Client:
        """The single one beside it."""

    def init(self) -> int:
        """Resets the TPM."""

    def stop(self) -> None:
        """Powers it off."""

    def volatile_blob(self) -> bytes:
        """As for another host."""

    def tcti(self) -> str:
        """For tpm2-tools."""


@contextmanager
def clients(world: World[SomeClient], count: int) -> Iterator[list[SomeClient]]:
    with ExitStack() as stack:
        there = [world.client() for _ in range(count)]
        for client in there:
            stack.enter_context(client)
        yield there


def opened(client: Client, command: bytes) -> int:
    """The handle of a successful command."""
    return m.handle_of(client.command(command))


def objects_of(client: Client) -> list[int]:
    return m.listed(client.command(m.list_handles(0x80000000)))


def test_more_objects_than_a_tpm_holds_for_each_of_many_clients(world: World[Client]) -> None:
    with clients(world, 5) as there:
        keys = {
            number * 8 + i: (client, opened(client, m.load_external(number * 8 + i)))
            for number, client in enumerate(there)
            for i in range(8)
        }
        first = {n: m.unique_of(c.command(m.read_public(h))) for n, (c, h) in keys.items()}
        again = {n: m.unique_of(c.command(m.read_public(h))) for n, (c, h) in keys.items()}
        assert first == again
        assert len(set(first.values())) == 40
        for client in there:
            assert objects_of(client) == list(range(0x80000000, 0x80000008))


def is_refused(client: Client, command: bytes) -> bool:
    """By the manager; a device says of some what /dev/tpmrm0 says."""
    try:
        response = client.command(command)
    except OSError as exc:
        return exc.errno == errno.EINVAL
    return code_of(response) & 0xFFFF0000 == 0x000B0000


def test_no_client_reaches_anothers(world: World[Client]) -> None:
    with clients(world, 2) as (owner, thief):
        key, session = opened(owner, m.load_external(1)), opened(owner, m.start_session())
        for foreign in (m.read_public(key), m.flush(key), m.save(key)):
            assert is_refused(thief, foreign)
        for foreign in (m.policy_digest(session), m.flush(session), m.save(session)):
            assert code_of(thief.command(foreign)) & 0xFFFF0000 == 0x000B0000
        assert objects_of(thief) == []
        assert code_of(owner.command(m.read_public(key))) == 0
        assert code_of(owner.command(m.policy_digest(session))) == 0


def test_nothing_stays_of_a_client_that_has_gone(world: World[Client]) -> None:
    for _ in range(40):
        with world.client() as client:
            for number in range(3):
                opened(client, m.load_external(number))
                opened(client, m.start_session())
    with world.raw() as raw:
        wait_until(
            lambda: not m.listed(raw.command(m.list_handles(0x80000000))), "no object is left"
        )
        assert m.listed(raw.command(m.list_handles(0x02000000))) == []
        assert m.listed(raw.command(m.list_handles(0x03000000))) == []


def test_quotas_are_one_clients(world: World[Client]) -> None:
    with clients(world, 2) as (greedy, modest):
        mine = opened(modest, m.load_external(9999))
        for number in range(OBJECTS):
            opened(greedy, m.load_external(number))
        assert code_of(greedy.command(m.load_external(OBJECTS))) == 0x000B0902
        for _ in range(SESSIONS):
            opened(greedy, m.start_session())
        assert code_of(greedy.command(m.start_session())) == 0x000B0903
        assert code_of(modest.command(m.read_public(mine))) == 0
        assert opened(modest, m.start_session())


def test_a_reset_ends_all_objects_and_no_client(world: World[Client]) -> None:
    with clients(world, 2) as there:
        handles = [opened(client, m.load_external(1)) for client in there]
        session = opened(there[0], m.start_session())
        context = m.context_in(there[0].command(m.save(session)))
        assert world.init() == 0
        assert code_of(there[0].command(get_random(8))) == 0x100  # not started
        assert world.init() == 0
        assert code_of(there[0].command(tpm2(0x144, struct.pack(">H", 0)))) == 0
        for client, handle in zip(there, handles, strict=True):
            assert objects_of(client) == []
            assert code_of(client.command(m.read_public(handle))) == 0x000B0910
            assert opened(client, m.load_external(2))
        assert opened(there[1], m.load(context)) == session  # as without a manager


def test_sessions_of_an_earlier_life_are_in_nobodys_way(world: World[Client]) -> None:
    for _ in range(6):
        with clients(world, 4) as there:
            for client in there:
                for _ in range(SESSIONS_OF_A_USER // 4):
                    opened(client, m.start_session())
            assert world.init() == 0
            assert code_of(there[0].command(tpm2(0x144, struct.pack(">H", 0)))) == 0


def test_a_stopped_tpm_answers_every_client(world: World[Client]) -> None:
    with clients(world, 2) as there:
        key = opened(there[0], m.load_external(1))
        world.stop()
        for client in there:
            assert code_of(client.command(get_random(4))) == 0x101
        assert code_of(there[0].command(m.read_public(key))) & 0xFFF == 0x101


def test_state_leaves_without_the_clients_objects(world: World[Client]) -> None:
    with world.client() as client:
        key, session = opened(client, m.load_external(1)), opened(client, m.start_session())
        assert world.volatile_blob()
        with world.raw() as raw:
            assert m.listed(raw.command(m.list_handles(0x80000000))) == []
            assert m.listed(raw.command(m.list_handles(0x02000000))) == []
        assert code_of(client.command(m.read_public(key))) == 0x000B0910
        assert code_of(client.command(m.policy_digest(session))) == 0x000B0910


def test_the_single_client_of_the_other_channel_keeps_what_it_has(world: World[Client]) -> None:
    with world.raw() as raw, world.client() as client:
        mine = opened(raw, m.load_external(1))
        opened(raw, m.start_session())
        handles = [opened(client, m.load_external(number)) for number in range(2, 8)]
        assert all(code_of(client.command(m.read_public(handle))) == 0 for handle in handles)
        assert code_of(raw.command(m.read_public(mine))) == 0
        assert len(m.listed(raw.command(m.list_handles(0x02000000)))) == 1


def test_a_long_command_holds_nobody_up_for_ever(world: World[Client]) -> None:
    with clients(world, 3) as (slow, *others):
        slow.send(create_primary_rsa(unique=b"unique"))
        keys = [opened(client, m.load_external(1)) for client in others]
        assert len(keys) == 2
        assert m.handle_of(slow.response()) == 0x80000000


def test_a_client_that_vanishes_in_the_middle_of_a_command(world: World[Client]) -> None:
    with world.client() as other:
        key = opened(other, m.load_external(1))
        for _ in range(5):
            with world.client() as client:
                client.send(create_primary_rsa(unique=os.urandom(8)))
        assert code_of(other.command(m.read_public(key))) == 0
    with world.raw() as raw:
        wait_until(
            lambda: not m.listed(raw.command(m.list_handles(0x80000000))), "no object is left"
        )


def test_any_mix_of_clients_against_a_model_without_limits(world: World[Client]) -> None:
    """Objects stay what they were, and each sequence is hashlib's, however they are interleaved."""
    choose = random.Random(15)  # noqa: S311
    with clients(world, 6) as there:
        objects: list[dict[int, bytes]] = [{} for _ in there]
        sequences: list[dict[int, list[bytes]]] = [{} for _ in there]
        made = 0
        for _ in range(600):
            i = choose.randrange(len(there))
            client, mine, running = there[i], objects[i], sequences[i]
            match choose.choice("ooouuussffc"):
                case "o" if len(mine) < 20:
                    made += 1
                    handle = opened(client, m.load_external(made))
                    mine[handle] = m.unique_of(client.command(m.read_public(handle)))
                case "u" if mine:
                    handle = choose.choice(list(mine))
                    assert m.unique_of(client.command(m.read_public(handle))) == mine[handle]
                case "s" if len(running) < 5:
                    running[opened(client, m.sequence_start())] = []
                case "f" if mine:
                    handle = choose.choice(list(mine))
                    del mine[handle]
                    assert code_of(client.command(m.flush(handle))) == 0
                    assert code_of(client.command(m.read_public(handle))) == 0x000B0910
                case "c" if running:
                    handle = choose.choice(list(running))
                    if choose.random() < 0.7:
                        part = choose.randbytes(choose.randrange(1, 60))
                        running[handle].append(part)
                        assert code_of(client.command(m.sequence_update(handle, part))) == 0
                    else:
                        data = b"".join(running.pop(handle))
                        digest = m.digest_in(client.command(m.sequence_complete(handle)))
                        assert digest == hashlib.sha256(data).digest()
            if choose.random() < 0.02:
                assert objects_of(client) == sorted([*mine, *running])


def tool(world: World[Client], folder: Path, *words: str | Path) -> str:
    """The output of a program of tpm2-tools that has succeeded, on a connection of its own."""
    done = subprocess.run(
        [*map(str, words)],
        cwd=folder,
        env={**os.environ, "TPM2TOOLS_TCTI": world.tcti()},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_SECONDS,
    )
    assert done.returncode == 0, (words, done.stderr)
    return done.stdout


def test_a_long_chain_of_tools_that_flush_nothing(world: World[Client], tmp_path: Path) -> None:
    """Each leaves what it has made to its end; their contexts are the bridge."""
    work = tmp_path / "work"
    work.mkdir()
    (work / "text").write_text("what is to be kept")
    tool(world, work, "tpm2_createprimary", "-C", "o", "-c", "primary")
    for n in range(6):
        pair = ("-u", f"{n}.pub", "-r", f"{n}.priv")
        tool(world, work, "tpm2_create", "-C", "primary", *pair)
        tool(world, work, "tpm2_load", "-C", "primary", *pair, "-c", f"{n}.ctx")
        tool(world, work, "tpm2_sign", "-c", f"{n}.ctx", "-o", f"{n}.sig", "text")
    for n in range(6):
        words = ("-c", f"{n}.ctx", "-m", "text", "-s", f"{n}.sig")
        tool(world, work, "tpm2_verifysignature", *words)
    tool(world, work, "tpm2_startauthsession", "-S", "session", "--policy-session")
    tool(world, work, "tpm2_policypcr", "-S", "session", "-l", "sha256:0,1", "-L", "policy")
    tool(world, work, "tpm2_flushcontext", "session")
    assert tool(world, work, "tpm2_getcap", "handles-transient") == ""
    assert tool(world, work, "tpm2_getcap", "handles-saved-session") == ""
