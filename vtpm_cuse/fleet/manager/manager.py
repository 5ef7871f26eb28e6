"""The manager: all TPMs of one catalogue, each under its name (implements `fleet.base.Fleet`)."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import re
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

import trio

from vtpm_cuse import faults
from vtpm_cuse.errors import ChannelError, FleetError, FrontendError, UsageError, VtpmError
from vtpm_cuse.files import make_folder
from vtpm_cuse.fleet.base import Bundle, Event, Note, Spec, Tpm
from vtpm_cuse.fleet.heritage import Heritage, SavedManager
from vtpm_cuse.fleet.manager.failures import translated
from vtpm_cuse.fleet.manager.history import History
from vtpm_cuse.fleet.manager.machine import Machine
from vtpm_cuse.fleet.manager.making import Made
from vtpm_cuse.fleet.manager.offers import Offers
from vtpm_cuse.fleet.manager.pool import PlainPool, Pool
from vtpm_cuse.fleet.manager.quota import Limits, Quota
from vtpm_cuse.fleet.manager.sleepers import Sleepers
from vtpm_cuse.fleet.manager.surroundings import Surroundings
from vtpm_cuse.fleet.manager.threads import in_thread
from vtpm_cuse.fleet.manager.volatile import FirstStarts
from vtpm_cuse.fleet.manager.workers import SPARE, Workers
from vtpm_cuse.fleet.states.catalogue import Catalogue, Entry, check_labels, check_name
from vtpm_cuse.fleet.states.vault import Vault, copy_state, read_state
from vtpm_cuse.wire.metrics import Histogram

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence
    from typing import Literal

    from vtpm_cuse.config import Secret
    from vtpm_cuse.fleet.base import Identity, Offer
    from vtpm_cuse.fleet.heritage import SavedMachine, SavedOpener
    from vtpm_cuse.fleet.manager.deposits import Deposits
    from vtpm_cuse.fleet.opener import MakesDevices

log = logging.getLogger(__name__)

SOCKET: Final = "manager.sock"
"""Where it is asked, in the folder of the sockets."""

_ID: Final = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
RUN_MODE: Final = 0o711
_EVENTS_MAX: Final = 1024
"""That one who watches may be behind; then it is told no more."""
_AT_A_TIME: Final = 256
"""TPMs that are described before others get their turn."""
_AT_ONCE: Final = 4
"""TPMs that are shut down side by side in the end."""


class Settings(NamedTuple):
    """How a manager works.

    Attributes:
        state: The folder of its TPMs.
        run: The folder of their sockets.
        idle: Seconds without a command after which a TPM sleeps.
        level: Of the log.
        limits: What one user may have.
        pool: Manufactured TPMs that are made ahead; None for a few, once somebody has wanted one.
        spare: Blank workers that wait.
        messages: The descriptor that workers write messages to, if any.
        group: Whose members may ask it, besides its user and root.
        metrics_file: Tells what its TPMs do, for a collector.
        own: It is a user's own: its devices are files in mounts.
        cdi: The folder for documents about TPMs that are offered to containers.
    """

    state: str
    run: str
    idle: float = 1.0
    level: int = 1
    limits: Limits = Limits()
    pool: int | None = None
    spare: int = SPARE
    messages: int | None = 2
    group: int | None = None
    metrics_file: str | None = None
    own: bool = False
    cdi: str | None = None


@contextlib.asynccontextmanager
async def managed(
    settings: Settings,
    opener: MakesDevices | None = None,
    left: Heritage | None = None,
    deposits: Deposits | None = None,
) -> AsyncIterator[Manager]:
    """A manager, while it is entered; behind it, all TPMs have been shut down in order, or left.

    It goes on with what another one has *left*; with *deposits*, another one can go on with what it
    has, however it ends. Who wants to end it cancels what is within, and not
    what is around it. Without *opener*, no TPM is a device.

    Raises:
        VtpmError: It cannot begin.
        OSError: The same.
    """
    make_folder(settings.run, RUN_MODE, umask=False)
    with contextlib.ExitStack() as undo:
        catalogue = Catalogue(settings.state, left and left.manager.lock)
        undo.callback(catalogue.close)
        sleepers: Sleepers[Machine] = Sleepers()
        undo.callback(sleepers.close)
        async with trio.open_nursery() as nursery:
            workers = Workers(nursery, settings.level, settings.messages, settings.spare)
            manager = Manager(settings, catalogue, workers, sleepers, nursery, opener, deposits)
            try:
                await manager.begin(left)
                manager.offer_again()
                nursery.start_soon(manager.wake_sleepers)
                yield manager
            finally:
                with trio.CancelScope(shield=True):
                    await manager.end()
                workers.close()
                nursery.cancel_scope.cancel()


class Manager:
    """See `fleet.base.Fleet`."""

    def __init__(
        self,
        settings: Settings,
        catalogue: Catalogue,
        workers: Workers,
        sleepers: Sleepers[Machine],
        nursery: trio.Nursery,
        opener: MakesDevices | None,
        deposits: Deposits | None = None,
    ) -> None:
        self._settings = settings
        self._catalogue = catalogue
        self._sleepers = sleepers
        self._nursery = nursery
        self._quota = Quota(catalogue, settings.limits)
        self._history = History()
        self._offers = Offers(settings.cdi, os.path.join(os.path.abspath(settings.run), SOCKET))
        self._coming: dict[str, int | None] = {}
        self.pool = Pool(catalogue, nursery, settings.pool)
        self.plain_pool = PlainPool(workers, nursery)
        self._numbers: set[int] = set()
        self._left = False
        self._watchers: set[trio.MemorySendChannel[Event]] = set()
        self.workers = workers
        self.wake_times = Histogram()
        self._surroundings = Surroundings(
            *(catalogue, workers, sleepers, nursery, os.path.abspath(settings.run)),
            *(settings.idle, self._changed, self.wake_times, FirstStarts()),
            *(opener, deposits),
        )
        self._machines = {
            name: Machine(name, entry, self._surroundings)
            for name, entry in catalogue.entries().items()
        }
        self._ids = {machine.entry.id: machine for machine in self._machines.values()}
        for machine in self._machines.values():
            self._quota.changed(machine)

    async def begin(self, left: Heritage | None) -> None:
        """Goes on with what another one has *left*; a TPM that cannot go on is off.

        Raises:
            VtpmError: There are no workers to be had.
            OSError: The same.
        """
        if left is None:
            await self.workers.start()
            return
        deposits, machines = self._surroundings.deposits, left.machines
        try:
            await self.workers.start(left.manager.form, left.manager.zygote)
        except ChannelError as exc:
            if deposits is None:
                raise
            log.error("TPMs that were on are off: %s", exc)
            deposits.forget(machines)
            machines = ()
            await self.workers.start()
        those = {machine.entry.id: machine for machine in self._machines.values()}
        if deposits is not None:
            deposits.forget(one for one in machines if one.id not in those)
        for saved in machines:
            if (machine := those.get(saved.id)) is None:
                continue
            try:
                machine.resume(saved)
            except (VtpmError, OSError) as exc:
                log.error("A TPM that was on is off: %s", faults.sentence(exc))

    def keep(self, listener: int, opener: SavedOpener | None, *, own_path: bool) -> None:
        """From now on another one can go on with its TPMs, where they outlive it; see `leave`."""
        if (deposits := self._surroundings.deposits) is not None:
            form, lock = self.workers.form, self._catalogue.lock
            deposits.put(SavedManager(form, lock, listener, own_path, None, opener))

    def offer_again(self) -> None:
        """Has documents of those that are on, and none that one who died has left of others."""
        for machine in self._machines.values():
            tpm = machine.described()
            if tpm.cdi == "off" or tpm.state == "stopped":
                self._offers.drop(tpm.id, left=True)
            try:
                self._offer(machine)
            except FrontendError as exc:
                log.error("%s: %s", tpm.name, exc)

    async def leave(self, listener: int, *, own_path: bool) -> Heritage:
        """All that the next manager needs; nothing is to be asked of this one any more.

        *listener* is where it will be asked; at a path that is the manager's own, if *own_path*.
        """
        found: list[SavedMachine] = []

        async def leave(machine: Machine) -> None:
            if (saved := await machine.leave()) is not None:
                found.append(saved)

        self._left = True
        async with trio.open_nursery() as nursery:
            for machine in self._machines.values():
                nursery.start_soon(leave, machine)
        form, zygote = await self.workers.leave()
        self._tell_no_more()
        saved = SavedManager(form, self._catalogue.leave(), listener, own_path, zygote, None)
        return Heritage(saved, tuple(found))

    async def wake_sleepers(self) -> None:
        """Wakes whom something comes for, for ever."""
        while True:
            for machine in await self._sleepers.next():
                self._nursery.start_soon(machine.wake_for_client)

    async def end(self) -> None:
        """Shuts all of them down, in order, but for those that are left; who outlives it sleeps on."""
        if self._left:
            return
        limit = trio.CapacityLimiter(_AT_ONCE)

        async def stop(machine: Machine) -> None:
            async with limit, machine.turn:
                with contextlib.suppress(VtpmError):
                    await machine.settle()

        async with trio.open_nursery() as nursery:
            for machine in self._machines.values():
                nursery.start_soon(stop, machine)
        self._offers.close()
        self._tell_no_more()

    # -- what is asked for --------------------------------------------------------------------

    async def create(self, spec: Spec, secret: Secret | None = None) -> Tpm:
        """Makes a TPM, stopped."""
        name = spec.name
        check_labels(name, spec.labels)
        self._offers.need(spec.cdi, spec.interface)
        with self._reserved(name, spec.owner), self._number_for(spec) as device:
            await self._need_room(name, spec.owner)
            try:
                pool = self.pool if spec.manufactured else self.plain_pool
                made = await pool.take(spec.profile)
                return await self._new(name, Entry.of(made.id, spec, device), made, secret)
            except UsageError as exc:
                raise FleetError("StateDamaged", name, str(exc)) from exc
            except (VtpmError, OSError) as exc:
                raise translated(name, exc) from exc

    async def take_in(self, bundle: Bundle, secret: Secret | None = None) -> Tpm:
        """Has a TPM that was exported, stopped."""
        name, spec = bundle.spec.name, bundle.spec
        check_labels(name, spec.labels)
        with (
            self._reserved(name, spec.owner),
            self._reserved_id(name, bundle.id),
            self._number_for(spec) as device,
        ):
            await self._need_room(name, spec.owner)
            try:
                return await self._new(name, Entry.of(bundle.id, spec, device), bundle, secret)
            except (VtpmError, OSError) as exc:
                raise translated(name, exc) from exc

    async def _new(
        self, name: str, entry: Entry, given: Made | Bundle, secret: Secret | None
    ) -> Tpm:
        """One that is *given*, with its folder. Raises VtpmError, OSError."""
        try:
            size = await in_thread(partial(self._put, name, entry, given, secret))
        finally:
            self._catalogue.give_up(entry.id)
        machine = Machine(name, entry, self._surroundings)
        if isinstance(given, Made):
            self._surroundings.first_starts.put(given)
        self._machines[name] = self._ids[entry.id] = machine
        self._quota.changed(machine, size)
        self._history.note(entry.id, "imported" if isinstance(given, Bundle) else "created")
        self._tell("created", machine)
        return machine.described()

    def _put(self, name: str, entry: Entry, given: Made | Bundle, secret: Secret | None) -> int:
        """On the disk, where nobody finds it before; so many bytes. Raises VtpmError, OSError."""
        vault = Vault.of(self._catalogue.begin(entry.id), entry.key, secret, may_begin=True)
        try:
            if isinstance(given, Made):
                vault.begin(given.permanent)
            else:
                vault.begin_with_untrusted(given.state)
        finally:
            vault.close()
        return self._catalogue.finish(name, entry)

    async def start(self, name: str, secret: Secret | None = None) -> Tpm:
        """Powers it on."""
        async with self._mine(name) as machine:
            await machine.start(secret)
            try:
                self._offer(machine)
            except FrontendError:
                await machine.stop()
                raise
            return machine.described()

    async def stop(self, name: str) -> Tpm:
        """Shuts it down, and powers it off."""
        async with self._mine(name) as machine:
            await machine.stop()
            self._quota.changed(machine)  # by all that it has stored
            return machine.described()

    async def reset(self, name: str) -> Tpm:
        """Powers it off and on."""
        async with self._mine(name) as machine:
            await machine.reset()
            return machine.described()

    async def remove(self, name: str, *, force: bool = False) -> None:
        """Deletes it with all that is its."""
        async with self._mine(name) as machine:
            if force:
                await machine.stop()
            machine.need_stopped()
            await self._off(lambda: self._catalogue.remove(machine.name, machine.entry))
            del self._machines[machine.name], self._ids[machine.entry.id]
            self._history.forget(machine.entry.id)
            self._surroundings.first_starts.forget(machine.entry.id)
            self._quota.removed(machine)
            self._tell("removed", machine)

    async def list(self, names: Sequence[str] | None = None) -> Sequence[Tpm]:
        """Those of *names*, or all."""
        machines = [*map(self._one, sorted(self._machines) if names is None else names)]
        async with trio.open_nursery() as nursery:
            for machine in machines:
                if machine.state == "awake":
                    nursery.start_soon(machine.count)
        found: list[Tpm] = []
        for machine in machines:
            if not len(found) % _AT_A_TIME:
                await trio.lowlevel.checkpoint()  # who wakes a TPM does not wait for all of them
            found.append(machine.described())
        return found

    async def describe(self, name: str) -> Tpm:
        """That one."""
        machine = self._one(name)
        await machine.count()
        return machine.described()

    async def update(
        self,
        name: str,
        new_name: str | None = None,
        labels: tuple[tuple[str, str], ...] | None = None,
        cdi: Offer | None = None,
    ) -> Tpm:
        """Another name, other labels, offered otherwise."""
        async with self._mine(name) as machine:
            entry = machine.entry
            if labels is not None:
                check_labels(machine.name, labels)
                entry = entry._replace(labels=labels)
            if cdi is not None:
                self._offers.need(cdi, entry.interface)
                entry = entry._replace(cdi=cdi)
            if entry != machine.entry:
                await self._off(lambda: self._catalogue.write(machine.name, entry))
                machine.entry = entry
                self._offers.drop(entry.id)
                self._offer(machine)
            if new_name is not None and new_name != machine.name:
                machine.need_stopped()
                old, new = machine.name, new_name
                with self._reserved(new):
                    await self._off(lambda: self._catalogue.rename(old, new))
                    machine.name = new
                    self._quota.changed(machine)  # somebody may have looked where it was
                    self._machines[new] = self._machines.pop(old)
                self._history.note(machine.entry.id, f"renamed from {old} to {new}")
            self._changed(machine)
            return machine.described()

    async def snapshot(self, name: str, snapshot: str) -> None:
        """Keeps a copy of its permanent state."""
        async with self._mine(name) as machine:
            machine.need_stopped()
            self._quota.changed(machine)  # it was on, since somebody has looked
            await self._quota.need_room(name, machine.entry.owner)

            def copy() -> None:
                with self._catalogue.new_snapshot(machine.name, snapshot) as folder:
                    copy_state(self._catalogue.state_of(machine.name), folder)

            await self._off(copy)
            self._quota.changed(machine)
            self._history.note(machine.entry.id, f"snapshot {snapshot} was made")

    async def restore(self, name: str, snapshot: str) -> Tpm:
        """Goes back to a copy."""
        async with self._mine(name) as machine:
            machine.need_stopped()

            def copy() -> None:
                folder = self._catalogue.need_snapshot(machine.name, snapshot)
                copy_state(folder, self._catalogue.state_of(machine.name))

            await self._off(copy)
            self._history.note(machine.entry.id, f"snapshot {snapshot} was restored")
            return machine.described()

    async def clone(self, name: str, new_name: str, identity: Identity = "new") -> Tpm:
        """Another by the same recipe."""
        entry = self._one(name).entry
        if identity == "same":
            reason = "the TPM with these seeds and keys is there: two would be one to others"
            raise FleetError("TpmExists", name, reason)
        return await self.create(entry.spec(new_name))

    async def export(self, name: str) -> Bundle:
        """A copy of it, for another place."""
        async with self._mine(name) as machine:
            machine.need_stopped()
            folder = self._catalogue.state_of(machine.name)
            try:
                state = await in_thread(partial(read_state, folder))
            except (VtpmError, OSError) as exc:
                raise translated(machine.name, exc) from exc
            self._history.note(machine.entry.id, "exported")
            return Bundle(machine.entry.id, machine.entry.spec(machine.name), state)

    async def hibernate(self, name: str) -> Tpm:
        """Puts it to sleep."""
        async with self._mine(name) as machine:
            await machine.hibernate()
            return machine.described()

    async def wake(self, name: str) -> Tpm:
        """Gives it a process."""
        async with self._mine(name) as machine:
            await machine.wake()
            return machine.described()

    async def look(self, name: str, what: str) -> bytes | None:
        """What it says of itself."""
        async with self._mine(name) as machine:
            return await machine.look(what)

    async def logs(self, name: str) -> Sequence[Note]:
        """What has happened to it."""
        await trio.lowlevel.checkpoint()
        return self._history.of(self._one(name).entry.id)

    def watch(self) -> trio.MemoryReceiveChannel[Event]:
        """What happens from now on."""
        send, receive = trio.open_memory_channel[Event](_EVENTS_MAX)
        self._watchers.add(send)
        return receive

    # -- helpers ----------------------------------------------------------------------------------

    def _one(self, name: str) -> Machine:
        """Which has this name or this id."""
        found = self._machines.get(name) or self._ids.get(name)
        if found is None:
            raise FleetError("NoSuchTpm", check_name(name), "there is no such TPM")
        return found

    @contextlib.asynccontextmanager
    async def _mine(self, name: str) -> AsyncIterator[Machine]:
        """That TPM, for one who changes it."""
        machine = self._one(name)
        async with machine.turn:
            if self._machines.get(machine.name) is not machine:
                raise FleetError("NoSuchTpm", name, "there is no such TPM any more")
            yield machine

    async def _need_room(self, name: str, owner: int) -> None:
        """For one that has its name, and is yet to be. Raises FleetError."""
        coming = [*self._coming.values()].count(owner)
        await self._quota.need_room(name, owner, coming)

    @contextlib.contextmanager
    def _reserved(self, name: str, owner: int | None = None) -> Iterator[None]:
        """While something gets this name, nothing else does. Raises FleetError.

        Args:
            name: Of nothing yet.
            owner: Of a TPM that is made.
        """
        if check_name(name) in self._machines or name in self._coming:
            raise FleetError("TpmExists", name, "there is such a TPM already")
        if _ID.fullmatch(name):
            raise FleetError("BadName", name, "this may be the id of another one")
        self._coming[name] = owner
        try:
            yield
        finally:
            del self._coming[name]

    @contextlib.contextmanager
    def _reserved_id(self, name: str, number: str) -> Iterator[None]:
        """While one comes that has an id already. Raises FleetError where there is that TPM."""
        there = self._ids.get(number)
        if there is not None or number in self._coming:
            where = f"there already, as {there.name}" if there else "on its way already"
            raise FleetError("TpmExists", name, f"it is {where}")
        self._coming[number] = None
        try:
            yield
        finally:
            del self._coming[number]

    @contextlib.contextmanager
    def _number_for(self, spec: Spec) -> Iterator[int]:
        """The first that no device has, nor one that is being made.

        Raises:
            FrontendError: This manager has no such devices.
            FleetError: That user cannot have one.
        """
        if spec.interface != "socket":
            self._surroundings.need_opener(spec.interface)
        if spec.interface == "fuse" and spec.owner != os.geteuid():
            raise FleetError("NotOwner", spec.name, "a mount is for the manager's user alone")
        if spec.interface != "cuse":
            yield 0
            return
        devices = (one.entry for one in self._machines.values() if one.entry.interface == "cuse")
        taken = {entry.number for entry in devices} | self._numbers
        found = next(number for number in itertools.count() if number not in taken)
        self._numbers.add(found)
        try:
            yield found
        finally:
            self._numbers.discard(found)

    @staticmethod
    async def _off(job: Callable[[], None]) -> None:
        """Does what waits for the disk; errors are a fleet's."""
        try:
            await in_thread(job)
        except (VtpmError, OSError) as exc:
            raise translated("the catalogue", exc) from exc

    def _tell_no_more(self) -> None:
        for watcher in self._watchers:
            watcher.close()

    def _offer(self, machine: Machine) -> None:
        """If it is on, by now. Raises FrontendError."""
        if machine.state != "stopped":
            self._offers.put(machine.described())

    def _changed(self, machine: Machine) -> None:
        self._tell("changed", machine)

    def _tell(self, kind: Literal["created", "changed", "removed"], machine: Machine) -> None:
        event = Event(kind, machine.described())
        if kind == "changed":
            self._history.see(event.tpm)
        if machine.state == "stopped":
            self._offers.drop(machine.entry.id)
        for watcher in tuple(self._watchers):
            try:
                watcher.send_nowait(event)
            except (trio.WouldBlock, trio.BrokenResourceError):
                watcher.close()
                self._watchers.discard(watcher)
