"""Clients that send anything and go in the middle of it, beside one that is in nobody's way."""

from __future__ import annotations

import hashlib
import random
from contextlib import suppress
from typing import TYPE_CHECKING

from tests.device.managed import clients, opened
from tests.support import managed as m
from tests.support.broken_commands import broken, seeds
from tests.support.commands import code_of

if TYPE_CHECKING:
    from tests.device.managed import Client, World

ROUNDS = 40
COMMANDS = 40
SEEDS = [*seeds(), *(m.load_external(n) for n in range(20)), *(m.start_session(),) * 20]


class Modest:
    """A client that has objects, sessions and sequences, and uses them."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._keys = dict.fromkeys(map(self._made, map(m.load_external, range(4))), b"")
        self._sessions = {self._made(m.start_session()): b"" for _ in range(4)}
        self._sequences = {self._made(m.sequence_start()): b"" for _ in range(3)}
        for number, session in enumerate(self._sessions):
            self._succeeds(m.policy_command_code(session, 0x17A + number))
        for had, question in ((self._keys, m.read_public), (self._sessions, m.policy_digest)):
            had.update({handle: self._succeeds(question(handle)) for handle in had})

    def _made(self, command: bytes) -> int:
        return opened(self._client, command)

    def _succeeds(self, command: bytes) -> bytes:
        answer = self._client.command(command)
        assert code_of(answer) == 0, (command.hex(), answer.hex())
        return answer

    def check(self, chance: random.Random) -> None:
        """All is there, and as it was; of nothing that changes is there an older state."""
        for had, question in ((self._keys, m.read_public), (self._sessions, m.policy_digest)):
            assert all(self._succeeds(question(handle)) == had[handle] for handle in had)
        session = chance.choice(list(self._sessions))
        assert self._made(m.load(self._succeeds(m.save(session))[10:])) == session
        sequence, data = chance.choice(list(self._sequences)), chance.randbytes(20)
        self._succeeds(m.sequence_update(sequence, data))
        self._sequences[sequence] += data
        objects = sorted([*self._keys, *self._sequences])
        for first, own in ((0x80000000, objects), (0x02000000, sorted(self._sessions))):
            assert sorted(m.listed(self._succeeds(m.list_handles(first)))) == own

    def end(self) -> None:
        for sequence, data in self._sequences.items():
            digest = m.digest_in(self._succeeds(m.sequence_complete(sequence)))
            assert digest == hashlib.sha256(data).digest()


def test_clients_that_send_anything_beside_one_that_does_not(world: World[Client]) -> None:
    chance = random.Random(15)  # noqa: S311
    with world.client() as client:
        modest = Modest(client)
        for _ in range(ROUNDS):
            with clients(world, 2) as there, suppress(OSError):
                for _ in range(chance.randrange(COMMANDS)):
                    hostile, command = chance.choice(there), broken(chance, chance.choice(SEEDS))
                    hostile.send(command)
                    whole = len(command) >= 10 and int.from_bytes(command[2:6], "big") == len(
                        command
                    )
                    if not whole or chance.random() < 0.1:
                        break  # it goes before it has an answer, if there is one
                    hostile.response()
            modest.check(chance)
        modest.end()
