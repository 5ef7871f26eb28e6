"""The resource manager under any order of commands of many clients, beside a model without limits.

The model has no slots, no swaps and no gap: what a client has is there, as it was, until somebody
who may ends it; a context is good for what it says, and of a session for once. When the state leaves
for another TPM, contexts are all that is left.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import pytest

from tests.device.managed_crowd import create_signing_key
from tests.support import commands as tpm
from tests.support import managed as m
from tests.support.auditor import Auditor
from tests.support.commands import code_of
from vtpm_cuse.engine.base import StateType
from vtpm_cuse.resmgr.manager import Connection, Manager
from vtpm_cuse.resmgr.quota import Limits

if TYPE_CHECKING:
    from vtpm_cuse.engine.libtpms import LibtpmsEngine

STEPS: Final = 5000
CLIENTS: Final = 6
OWN_OBJECTS: Final = 12
OWN_SESSIONS: Final = 8
ALL_SESSIONS: Final = 60
GAP: Final = 0xFF
LIMITS: Final = Limits(sessions_of_a_user=ALL_SESSIONS, abandoned=ALL_SESSIONS)
OWNER: Final = 0x40000001
CLEAR: Final = tpm.tpm2(0x126, m.u32(0x4000000C) + m.PASSWORD, sessions=True)
NO_OBJECT, NO_HANDLE = 0xB0910, 0xB01CB
TRANSIENT, LOADED, SAVED = 0x80000000, 0x02000000, 0x03000000


@dataclass(eq=False)
class Thing:
    """An object, by what it is; of a sequence, what has gone into it."""

    public: bytes = b""
    data: bytes | None = None
    of_owner: bool = False
    dead: bool = False


@dataclass(eq=False)
class Story:
    """An active session: of a policy its digest; what its newest context is, once saved.

    One that is *foreign* has left with the state: it lives until it grows too old to be saved, for
    who has its context alone could refresh it.
    """

    handle: int
    digest: bytes = bytes(32)
    auditor: Auditor | None = None
    context: bytes = b""
    foreign: bool = False


@dataclass(eq=False)
class Owner:
    """A connection, and what it has by the model."""

    connection: Connection
    things: dict[int, Thing] = field(default_factory=dict)
    stories: list[Story] = field(default_factory=list)

    def __call__(self, command: bytes) -> bytes:
        return self.connection.process(command)


class World:
    """A manager with its clients, and the model of them."""

    def __init__(self, engine: LibtpmsEngine, chance: random.Random) -> None:
        self._engine, self._chance = engine, chance
        self._below = m.Gapped(engine.process, GAP)
        self.manager = self._manager()
        self.owners = [Owner(self.manager.connect()) for _ in range(CLIENTS)]
        self._objects: list[tuple[bytes, Thing]] = []
        self._contexts: list[tuple[bytes, Story]] = []
        self._abandoned: list[Story] = []
        self._made = 0
        self.resets = self.moves = self.suspensions = 0
        self.swapped = self.refreshed = 0

    def _manager(self) -> Manager:
        return Manager(self._below, limits=LIMITS)

    def count(self) -> None:
        """What the manager has done of its own until now, or until a reset."""
        objects, sessions = self.manager.objects, self.manager.sessions
        self.swapped += min(objects.evictions, sessions.evictions)
        self.refreshed += sessions.refreshes

    def step(self) -> None:
        """One thing that a client may do, and what it must hear."""
        chance = self._chance
        actions = (
            *(self.make,) * 4,
            *(self.use,) * 12,
            *(self.start,) * 3,
            *(self.use_session,) * 12,
            *(self.save_object, self.load_object, self.save_session) * 2,
            *(self.load_session,) * 3,
            *(self.flush, self.flush_session, self.trespass),
            self.look,
        )
        owner = chance.choice(self.owners)
        rare = chance.random()
        if rare < 0.003:
            self.clear(owner)
        elif rare < 0.0035:
            self.reset()
        elif rare < 0.0045:
            self.move()
        elif rare < 0.0085:
            self.suspend()
        elif rare < 0.017:
            self.leave(owner)
        else:
            refused = self._below.refused
            chance.choice(actions)(owner)
            self._age(in_the_way=self._below.refused > refused)

    # -- objects --------------------------------------------------------------------------

    def make(self, owner: Owner) -> None:
        if len(owner.things) >= OWN_OBJECTS:
            return
        self._made += 1
        match self._chance.randrange(4):
            case 0:
                handle = m.handle_of(owner(m.sequence_start()))
                owner.things[handle] = Thing(data=b"")
                return
            case 1:
                command, thing = create_signing_key(self._made, OWNER), Thing(of_owner=True)
            case _:
                command, thing = m.load_external(self._made), Thing()
        handle = m.handle_of(owner(command))
        thing.public = m.unique_of(owner(m.read_public(handle)))
        assert thing.public not in {other.public for other in owner.things.values()}
        owner.things[handle] = thing

    def use(self, owner: Owner) -> None:
        if not owner.things:
            return
        handle, thing = self._chance.choice(list(owner.things.items()))
        if thing.dead:
            assert code_of(owner(m.read_public(handle))) == NO_OBJECT
            del owner.things[handle]
        elif thing.data is None:
            assert m.unique_of(owner(m.read_public(handle))) == thing.public
        elif self._chance.random() < 0.8:
            more = self._chance.randbytes(self._chance.randrange(50))
            thing.data += more
            assert code_of(owner(m.sequence_update(handle, more))) == 0
        else:
            del owner.things[handle]
            digest = m.digest_in(owner(m.sequence_complete(handle)))
            assert digest == hashlib.sha256(thing.data).digest()

    def save_object(self, owner: Owner) -> None:
        if not owner.things:
            return
        handle, thing = self._chance.choice(list(owner.things.items()))
        answer = owner(m.save(handle))
        if thing.dead:
            assert code_of(answer) == NO_OBJECT
            del owner.things[handle]
            return
        assert code_of(answer) == 0
        copy = Thing(thing.public, thing.data, thing.of_owner)
        self._objects.append((answer[10:], copy))

    def load_object(self, owner: Owner) -> None:
        """From whomever; as often as one likes, each a thing of its own."""
        if not self._objects or len(owner.things) >= OWN_OBJECTS:
            return
        context, saved = self._chance.choice(self._objects)
        answer = owner(m.load(context))
        if saved.dead:
            assert code_of(answer) == 0x1DF
            return
        thing = Thing(saved.public, saved.data, saved.of_owner)
        owner.things[m.handle_of(answer)] = thing

    def flush(self, owner: Owner) -> None:
        if not owner.things:
            return
        handle = self._chance.choice(list(owner.things))
        del owner.things[handle]
        assert code_of(owner(m.flush(handle))) == 0
        assert code_of(owner(m.read_public(handle))) == NO_OBJECT

    # -- sessions -------------------------------------------------------------------------

    def start(self, owner: Owner) -> None:
        active = sum(len(one.stories) for one in self.owners) + len(self._abandoned)
        if len(owner.stories) >= OWN_SESSIONS or active >= ALL_SESSIONS:
            return
        if self._chance.random() < 0.4:
            auditor = Auditor(owner)
            owner.stories.append(Story(auditor.handle, auditor=auditor))
        else:
            owner.stories.append(Story(m.handle_of(owner(m.start_session()))))

    def use_session(self, owner: Owner) -> None:
        if not owner.stories:
            return
        story = self._chance.choice(owner.stories)
        if story.context:
            assert code_of(owner(m.policy_digest(story.handle))) == NO_OBJECT
        elif story.auditor is not None:
            story.auditor.audit()
        else:
            code = self._chance.randrange(0x11F, 0x193)
            answer = owner(m.policy_command_code(story.handle, code))
            if code_of(answer) == 0:
                step = story.digest + m.u32(0x16C, code)
                story.digest = hashlib.sha256(step).digest()
            assert owner(m.policy_digest(story.handle))[12:] == story.digest
            if self._chance.random() < 0.5:  # else it takes no other code
                assert code_of(owner(tpm.tpm2(0x180, m.u32(story.handle)))) == 0
                story.digest = bytes(32)

    def save_session(self, owner: Owner) -> None:
        if not owner.stories:
            return
        story = self._chance.choice(owner.stories)
        answer = owner(m.save(story.handle))
        if story.context:
            assert code_of(answer) == NO_OBJECT
            return
        assert code_of(answer) == 0
        story.context = answer[10:]
        self._contexts.append((story.context, story))

    def load_session(self, owner: Owner) -> None:
        """By the newest context alone, from its owner or one who has gone; then it is used up."""
        if not self._contexts or len(owner.stories) >= OWN_SESSIONS:
            return
        recent = self._contexts[-12:] if self._chance.random() < 0.7 else self._contexts
        context, story = self._chance.choice(recent)
        answer = owner(m.load(context))
        if story.context != context:
            assert code_of(answer) != 0
            return
        assert m.handle_of(answer) == story.handle
        self._forget(story)
        story.context, story.foreign = b"", False
        owner.stories.append(story)
        if story.auditor is not None:
            story.auditor.process = owner
            story.auditor.audit()
        else:
            assert owner(m.policy_digest(story.handle))[12:] == story.digest

    def _forget(self, story: Story) -> None:
        for holder in (*(owner.stories for owner in self.owners), self._abandoned):
            if story in holder:
                holder.remove(story)

    def flush_session(self, owner: Owner) -> None:
        """One's own, or one of those who have gone; by either kind."""
        there = [*owner.stories, *self._abandoned]
        if not there:
            return
        story = self._chance.choice(there)
        kind = self._chance.choice((LOADED, SAVED))
        assert code_of(owner(m.flush(kind | story.handle & 0xFFFFFF))) == 0
        self._forget(story)
        story.context = b""
        assert code_of(owner(m.policy_digest(story.handle))) == NO_OBJECT

    # -- borders --------------------------------------------------------------------------

    def trespass(self, owner: Owner) -> None:
        """What is another's answers as what is not there."""
        other = self._chance.choice([one for one in self.owners if one is not owner])
        for handle in set(other.things) - set(owner.things):
            assert code_of(owner(m.read_public(handle))) == NO_OBJECT
            assert code_of(owner(m.flush(handle))) == NO_HANDLE
        for story in other.stories:
            for command in (m.policy_digest(story.handle), m.save(story.handle)):
                assert code_of(owner(command)) == NO_OBJECT
            assert code_of(owner(m.flush(story.handle))) == NO_HANDLE

    def look(self, owner: Owner) -> None:
        alive = [handle for handle, thing in owner.things.items() if not thing.dead]
        listed = m.listed(owner(m.list_handles(TRANSIENT)))
        assert [handle for handle in listed if handle in alive] == sorted(alive)
        assert set(listed) <= set(owner.things)
        loaded = [story.handle for story in owner.stories if not story.context]
        assert m.listed(owner(m.list_handles(LOADED))) == by_index(loaded)
        saved = [story.handle for story in owner.stories if story.context]
        saved += [story.handle for story in self._abandoned]
        found = m.listed(owner(m.list_handles(SAVED)))
        assert found == [LOADED | handle & 0xFFFFFF for handle in by_index(saved)]

    def leave(self, owner: Owner) -> None:
        """Its saved sessions stay for who has their contexts."""
        owner.connection.close()
        for story in owner.stories:
            if story.context:
                self._abandoned.append(story)
        self.owners[self.owners.index(owner)] = Owner(self.manager.connect())

    def clear(self, owner: Owner) -> None:
        assert code_of(owner(CLEAR)) == 0
        things = [thing for one in self.owners for thing in one.things.values()]
        for thing in (*things, *(thing for _, thing in self._objects)):
            thing.dead |= thing.of_owner

    def reset(self) -> None:
        """In order, contexts of objects stay good, and saved sessions; else none does."""
        in_order = self._chance.random() < 0.7
        if in_order:
            assert code_of(self._engine.process(tpm.TPM2_SHUTDOWN_STATE)) == 0
        startups = (tpm.TPM2_STARTUP_STATE, tpm.TPM2_STARTUP_CLEAR)
        startup = startups[not in_order or self._chance.randrange(2)]
        self.count()
        self._engine.stop()
        self._engine.start()
        self.manager.reset()
        assert code_of(self.owners[0](startup)) == 0
        for owner in self.owners:
            for handle in owner.things:
                assert code_of(owner(m.read_public(handle))) == NO_OBJECT
            owner.things.clear()
            for story in [one for one in owner.stories if not (one.context and in_order)]:
                owner.stories.remove(story)
                story.context = b""
        for story in () if in_order else self._abandoned:
            story.context = b""
        self._abandoned = self._abandoned if in_order else []
        for _, thing in () if in_order else self._objects:
            thing.dead = True
        self.resets += 1

    def _goes_on(self) -> None:
        """The TPM is off, and on again, with the volatile state that it had."""
        state = self._engine.volatile_state()
        self._engine.stop()
        self._engine.set_state(StateType.VOLATILE, state)
        self._engine.start()

    def move(self) -> None:
        """The state leaves, for another process or this one: contexts load there, the newest alone."""
        self.count()
        self.manager.drop()
        for first in (TRANSIENT, LOADED):
            assert m.listed(self._below.process(m.list_handles(first))) == []
        for owner in self.owners:
            owner.things.clear()
            self._abandoned += [story for story in owner.stories if story.context]
            owner.stories.clear()
        for story in self._abandoned:
            story.foreign = True
        self._end_old()
        self._goes_on()
        if self._chance.random() < 0.5:
            self.manager.reset(resumed=True)
        else:
            self.manager = self._manager()
            self.manager.reset(resumed=True)
            self.owners = [Owner(self.manager.connect()) for _ in range(CLIENTS)]
        self.look(self.owners[0])
        self.moves += 1

    def _has(self, story: Story) -> bool:
        """Whether the TPM itself would load its context."""
        sequence = int.from_bytes(story.context[:8], "big")
        return self._below.saved_as(story.handle) == sequence

    def _age(self, *, in_the_way: bool) -> None:
        """One that nobody here can refresh is ended, when nothing could be saved any more."""
        assert self._end_old() == 0 or in_the_way

    def _end_old(self) -> int:
        old = [one for one in self._abandoned if one.foreign and not self._has(one)]
        for story in old:
            self._forget(story)
            story.context = b""
        return len(old)

    def suspend(self) -> None:
        """Nobody can tell."""
        saved = self.manager.suspend()
        self._goes_on()
        self.manager = self._manager()
        self.manager.resume(saved)
        for owner in self.owners:
            owner.connection = self.manager.connections[owner.connection.number]
        self.suspensions += 1


def by_index(handles: list[int]) -> list[int]:
    return sorted(handles, key=lambda handle: handle & 0xFFFFFF)


@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_commands(seed: int) -> None:
    with m.started_engine() as engine:
        world = World(engine, random.Random(seed))  # noqa: S311
        for _ in range(STEPS):
            world.step()
        world.count()
        assert min(world.resets, world.refreshed, world.moves, world.suspensions) > 0
        assert world.swapped > STEPS // 20
        for owner in world.owners:
            world.look(owner)
        for owner in world.owners:
            owner.connection.close()
        assert m.listed(engine.process(m.list_handles(TRANSIENT))) == []
        assert m.listed(engine.process(m.list_handles(LOADED))) == []
