"""One TPM of a fleet: off, asleep, awake in a worker, or failed.

Asleep it is its descriptors and some bytes, which are handed out once. What its clients send is
never read here, and what its worker says is checked.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import time
from typing import TYPE_CHECKING, Final

import trio

from vtpm_cuse.errors import ChannelError, FleetError, FrontendError, VtpmError
from vtpm_cuse.fleet.base import State, Tpm
from vtpm_cuse.fleet.blocking import close_all
from vtpm_cuse.fleet.heritage import SavedMachine
from vtpm_cuse.fleet.manager.entrances import opened, places, reopened
from vtpm_cuse.fleet.manager.failures import translated
from vtpm_cuse.fleet.manager.threads import in_thread
from vtpm_cuse.fleet.manager.volatile import Volatile
from vtpm_cuse.fleet.manager.workers import WorkerProcess, keep, said_by
from vtpm_cuse.fleet.messages import Message, Order, Report
from vtpm_cuse.fleet.states.vault import Vault
from vtpm_cuse.fleet.tasks import IN_ORDER, OFF, ON, RESUME, WATCH_DATA, Task

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from threading import Thread

    from vtpm_cuse.config import Secret
    from vtpm_cuse.fleet.manager.entrances import Entrance
    from vtpm_cuse.fleet.manager.surroundings import Surroundings
    from vtpm_cuse.fleet.states.catalogue import Entry

log = logging.getLogger(__name__)

FOLDER: Final = "tpm"
"""In that of the sockets: it has one for each TPM."""
_STOP_SECONDS: Final = 60.0
"""For what an order takes: a key that is being made is given up at once, a disk may be slow."""
_LEAVE_SECONDS: Final = 10.0
"""For what has begun, before a manager leaves; what takes longer has failed."""
_AGAIN_SECONDS: Final = 1.0
_COUNT_SECONDS: Final = 0.2
"""For a number that may as well be an older one."""
_BUSY_SECONDS: Final = 0.05
"""After which a client may have finished what it is in the middle of."""
_TRIES: Final = 3
_LOOK_MAX: Final = 1 << 13  # more than NV memory's largest index, where a certificate is
_NO_ANSWER: Final = "its process does not answer"
_NOT_CLOSED: Final = "what its last process has handed over is of somebody who does not let it go"
_IN_USE: Final = "a client is in the middle of something"
_COMMANDS_MAX: Final = 1 << 32
"""More than a worker can have executed between two sleeps."""


class Machine:
    """One TPM; who changes it has its `turn`.

    Attributes:
        name: It may be changed while the TPM is stopped.
        entry: What is kept of it on the disk.
        state: See `fleet.base.State`.
        turn: One change at a time.
    """

    def __init__(self, name: str, entry: Entry, surroundings: Surroundings) -> None:
        self.name = name
        self.entry = entry
        self.state: State = "stopped"
        self.turn = trio.Lock()
        self._all = surroundings
        self._deposits = surroundings.deposits
        self._failure = ""
        self._generation = 0
        self._commands = self._count = 0
        self._wakes = self._sleeps = self._failures = 0
        self._used: float | None = None
        self._vault: Vault | None = None
        self._entrance: Entrance | None = None
        self._worker: WorkerProcess | None = None
        self._serving = trio.Event()
        self._saved: Volatile | None = None
        self._settled = False
        self._connections: tuple[int, ...] = ()
        self._watch_data = True
        self._closer: Thread | None = None

    def described(self) -> Tpm:
        """It as it is now."""
        number = self._entrance.number if self._entrance else None
        found = places(self.entry.interface, self.name, self._folder, number)
        return Tpm(
            self.name,
            self.entry.id,
            self.entry.owner,
            self.state,
            self.entry.interface,
            found.sockets,
            self._generation,
            self._used,
            self._commands + self._count,
            self._wakes,
            self._worker.pid if self._worker else None,
            self._failure,
            self.entry.labels,
            self.entry.key is not None,
            self._sleeps,
            self._failures,
            found.device,
            found.managed_device,
            self.entry.cdi,
        )

    async def count(self) -> None:
        """Has its process tell what `described` says of commands, if it has one that serves it."""
        if (worker := self._worker) is not None and self._serving.is_set():
            await worker.count(_COUNT_SECONDS)

    @property
    def _folder(self) -> str:
        return os.path.join(self._all.run, FOLDER, self.name)

    def _become(self, state: State) -> None:
        if state != self.state:
            self.state = state
            self._failures += state == "failed"
            self._all.changed(self)

    def refusal(self, reason: str) -> FleetError:
        """Why something cannot be done now."""
        return FleetError("Busy", self.name, reason)

    def need_stopped(self) -> None:
        """Raises FleetError."""
        if self.state != "stopped":
            raise self.refusal(f"it is {self.state}; stop it first")

    # -- what is asked for --------------------------------------------------------------------

    async def start(self, secret: Secret | None = None) -> None:
        """Powers it on. Raises FleetError, FrontendError; it is stopped then."""
        self.need_stopped()
        self._become("starting")
        try:
            await in_thread(functools.partial(self._open_vault, secret))
            entrance = await self._open_entrance()
            if not (failure := await self._serve(ON)):
                await entrance.appear()
        except (VtpmError, OSError) as exc:
            await self._end_worker()
            self._power_off()
            if isinstance(exc, FrontendError):
                raise
            raise translated(self.name, exc) from exc
        if failure:  # it is failed now, and has not been on
            self._power_off()
            raise FleetError("StateDamaged", self.name, failure)

    async def stop(self) -> None:
        """Shuts it down in order, and powers it off. Raises FleetError."""
        entrance = self._entrance
        while self.state not in {"stopped", "failed"}:
            await self.wake()
            await self._ask(Order.STOP)
        if self.state == "failed":
            await self._end_worker()
            self._power_off()
        if entrance is not None:
            if self._deposits is not None:
                self._deposits.settle()
            await entrance.gone.wait()

    async def _end_worker(self, why: str = "") -> None:
        if (worker := self._worker) is not None:
            worker.kill(why)
            await worker.ended.wait()

    async def reset(self) -> None:
        """Powers it off and on, also after a failure. Raises FleetError."""
        if self.state == "stopped":
            raise self.refusal("it is stopped; start it")
        answer = None
        for _ in range(_TRIES):  # it may be about to fall asleep
            await self._awake()
            if (answer := await self._ask(Order.RESET)) is not None:
                break
        if answer is None or answer.kind is not Report.DONE:
            raise FleetError("StateDamaged", self.name, self._failure)

    async def hibernate(self) -> None:
        """Puts it to sleep. Raises FleetError."""
        answer = await self._ask(Order.SLEEP) if self.state == "awake" else None
        if answer is not None and answer.kind is Report.BUSY:
            raise self.refusal(_IN_USE)
        if self.state != "asleep":
            raise self.refusal(f"it is {self.state}")

    async def look(self, what: str) -> bytes | None:
        """What it says of itself, if it is awake; None for nothing. Raises FleetError."""
        answer = await self._ask(Order.LOOK, what.encode())
        if answer is None:
            raise self.refusal(f"it is {self.state}, and is not woken by a look")
        if answer.kind is not Report.TOLD:
            raise self.refusal(_IN_USE)
        if answer.flags not in {0, errno.ENOENT} or len(answer.body) > _LOOK_MAX:
            raise self.refusal("it cannot tell now")
        return None if answer.flags else answer.body

    async def wake(self) -> None:
        """Gives it a process. Raises FleetError."""
        if self.state not in {"asleep", "awake"}:
            raise self.refusal(f"it is {self.state}")
        await self._awake()

    async def _awake(self) -> None:
        if self._worker is None:
            try:
                await self._serve(RESUME if self._saved else OFF)
            except (VtpmError, OSError) as exc:
                raise translated(self.name, exc) from exc

    async def wake_for_client(self) -> None:
        """As something has come for it; where that is not to be, it comes again."""
        async with self.turn:
            if self._worker is not None or self._entrance is None or self._settled:
                return
            self._used = time.time()
            try:
                await self._awake()
            except FleetError as exc:
                log.error("%s", exc)
                await trio.sleep(_AGAIN_SECONDS)
                self._watch()

    async def _ask(self, order: Order, what: bytes = b"") -> Message | None:
        """What the worker answers; nothing where it has ended, as it has to by a STOP."""
        worker = self._worker
        if worker is None:
            return None
        answer = None
        with trio.move_on_after(_STOP_SECONDS) as scope:
            answer = await worker.ask(order, what)
            if order is Order.STOP:
                await worker.ended.wait()
        if scope.cancelled_caught:
            await self._end_worker(_NO_ANSWER)
        return answer

    # -- from one manager to the next -----------------------------------------------------------

    async def leave(self) -> SavedMachine | None:
        """What the next manager needs of it, if it is on; it is not used here any more.

        Who is awake stays so, and asks the next one.
        """
        await self._need_rest(self.turn.acquire)
        try:
            return await self._leave()
        finally:
            self.turn.release()

    async def _leave(self) -> SavedMachine | None:
        if (worker := self._worker) is not None:
            worker.rest()
            await self._need_rest(worker.rested.wait)
        if self._vault is None or self._entrance is None:
            return None
        self._all.sleepers.forget((*self._ours, *self._connections))
        saved = self._as_saved(self._vault)
        self._entrance.leave()
        if self._worker is not None:
            saved = saved._replace(worker=self._worker.suspend())
        if self._saved is not None:
            data, blob = self._saved.leave()
            saved = saved._replace(saved=data, blob=blob)
        self._vault.leave()
        self._vault = self._entrance = self._worker = self._saved = None
        self._connections = ()
        return saved

    def _as_saved(self, vault: Vault) -> SavedMachine:
        """It as plain values, of which one that comes behind a killed manager can make something."""
        return SavedMachine(
            id=self.entry.id,
            state=self.state,
            failure=self._failure,
            generation=self._generation,
            commands=self._commands,
            wakes=self._wakes,
            used=self._used,
            vault=vault.saved,
            entrance=self._ours,
            number=None if self._entrance is None else self._entrance.number,
            connections=self._connections,
            watch_data=self._watch_data,
            blob=None if self._saved is None else self._saved.fd,
            worker=None if self._worker is None else self._worker.kept(),
        )

    def _keep(self) -> None:
        """As it is now, it outlives the manager, where it does."""
        if self._deposits is not None and self._vault is not None:
            self._deposits.put(self._as_saved(self._vault))

    async def settle(self) -> None:
        """Puts it to sleep as if it were shut down: who finds what is kept goes on, or nobody does.

        Where a client is in the middle of something that has no end, it is stopped. Nothing wakes it
        any more. Raises FleetError.
        """
        if self._deposits is None:
            await self.stop()
            return
        self._settled = True
        if self.state == "failed":
            await self._end_worker()
            return
        with trio.move_on_after(_LEAVE_SECONDS):
            while self.state in {"awake", "asleep"}:
                await self._awake()
                if await self._ask(Order.SLEEP, IN_ORDER) is None and self.state == "asleep":
                    return
                await trio.sleep(_BUSY_SECONDS)
        await self.stop()

    async def _need_rest(self, waiting: Callable[[], Awaitable[None]]) -> None:
        """Waits; where that takes too long, its process is to blame, and ended."""
        with trio.move_on_after(_LEAVE_SECONDS) as scope:
            await waiting()
        if scope.cancelled_caught:
            if self._worker is not None:
                self._worker.resting = False
                self._worker.kill("it was in the middle of something that has no end")
            await waiting()

    def resume(self, saved: SavedMachine) -> None:
        """Goes on from there, before anything else. Raises VtpmError, OSError; it is off then."""
        try:
            self._resume(saved)
        except (VtpmError, OSError):
            self._power_off()
            raise

    def _resume(self, saved: SavedMachine) -> None:
        self.state, self._failure = saved.state, saved.failure
        self._generation, self._commands = saved.generation, saved.commands
        self._wakes, self._used = saved.wakes, saved.used
        self._saved, self._connections = Volatile.resume(saved.saved, saved.blob), saved.connections
        self._watch_data = saved.watch_data
        catalogue = self._all.catalogue
        folder = catalogue.state_of(self.name)
        self._vault = vault = Vault.resume(folder, saved.vault, catalogue.reserve)
        self._entrance = reopened(self.entry, self._folder, saved, self._all)
        if saved.worker is not None:
            with contextlib.suppress(BrokenPipeError):  # it has ended
                self._worker = WorkerProcess.resume(saved.worker)
        if self._worker is not None:
            if saved.worker is not None and saved.worker.channels is not None:
                self._serving.set()
            self._all.nursery.start_soon(self._attend, self._worker, vault)
            self._all.nursery.start_soon(self._rejoin, self._worker, self._serving)
        elif self._saved is None and self.state != "failed":
            self._end_of(None, None, vault)
        else:
            self._watch()
        self._keep()

    async def _rejoin(self, worker: WorkerProcess, serving: trio.Event) -> None:
        """Who wants something of it waits until its process has said again that it serves."""
        async with self.turn:
            with trio.move_on_after(_STOP_SECONDS) as scope:
                await serving.wait()
            if scope.cancelled_caught:
                worker.kill(_NO_ANSWER)

    # -- its process ------------------------------------------------------------------------------

    def _open_vault(self, secret: Secret | None) -> None:
        """Its state is for nobody else; a wrong key is no damage. Raises StorageError."""
        catalogue = self._all.catalogue
        folder, key = catalogue.state_of(self.name), self.entry.key
        self._vault = vault = Vault.of(folder, key, secret, reserve=catalogue.reserve)
        vault.lock()
        self._saved = self._all.first_starts.take(self.entry.id, vault.permanent())
        vault.forget_volatile()

    async def _open_entrance(self) -> Entrance:
        """Raises FrontendError where there is no device to be had, VtpmError, OSError."""
        catalogue = self._all.catalogue
        found = self._entrance = await opened(self.name, self.entry, self._folder, self._all)
        if self.entry.interface == "cuse" and self.entry.major != catalogue.major:
            self.entry = self.entry._replace(major=catalogue.major)
            await in_thread(functools.partial(catalogue.write, self.name, self.entry))
        return found

    @property
    def _ours(self) -> tuple[int, ...]:
        return () if self._entrance is None else self._entrance.descriptors

    async def _serve(self, mode: int) -> str:
        """Has a worker go on with it; returns why it does not begin to.

        Raises:
            VtpmError: There is no worker to be had; nothing has happened.
            OSError: The same.
        """
        if (vault := self._vault) is None:
            raise self.refusal("it is off")
        if self._closer is not None and self._closer.is_alive():
            raise self.refusal(_NOT_CLOSED)
        begin = trio.current_time()
        permanent = b"" if mode == OFF else vault.permanent_blob()
        worker = await self._all.workers.take()
        # From here on the volatile state is used up, whatever happens.
        saved = b"" if self._saved is None else self._saved.take()
        self._saved = None
        connections, self._connections = self._connections, ()
        held = (*self._ours, *connections)
        self._all.sleepers.forget(held)
        self._worker, self._serving = worker, trio.Event()
        self._generation += 1
        self._wakes += mode == RESUME
        if self.state != "failed":
            self._become("starting")
            self._failure = ""
        self._keep()
        self._all.nursery.start_soon(self._attend, worker, vault)
        order = Message(
            Order.SERVE,
            Task(
                *(self._all.idle, None, saved, permanent),
                *(self.entry.interface, self.entry.owner, self._generation),
            ).pack(),
            flags=mode,
            descriptors=held,
        )
        with contextlib.suppress(OSError):  # it has ended, which is seen elsewhere
            await worker.orders.send(order)
        close_all(connections)
        await self._serving.wait()
        self._all.workers.refill()
        if mode == RESUME and self._worker is not None:
            self._all.wake_times.observe(trio.current_time() - begin)
        return self._failure if self._worker is None else ""

    async def _attend(self, worker: WorkerProcess, vault: Vault) -> None:
        """From its birth to its end."""
        message: Message | None = None
        try:
            async with trio.open_nursery() as watching:
                watching.start_soon(worker.watch)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(keep, worker, vault, self._on_load)
                    try:
                        message = await self._hear(worker)
                    except (ChannelError, OSError) as exc:
                        worker.kill(f"its process was ended, for it has said {exc}")
                        worker.resting = False
                    if not worker.resting:
                        nursery.cancel_scope.cancel()
                watching.cancel_scope.cancel()
        finally:
            if not worker.resting or message is not None:
                try:
                    self._take_last(message, vault)
                    self._closer = await worker.die()  # it answers no client, and has no device
                    self._worker, self._used = None, time.time()
                    self._end_of(message, worker, vault)
                    self._commands, self._count = self._commands + self._count, 0
                finally:
                    worker.end()
                    self._serving.set()
            worker.rested.set()

    async def _hear(self, worker: WorkerProcess) -> Message | None:
        """The last message of a worker. Raises ChannelError."""
        while (message := await worker.orders.receive()) is not None:
            if message.kind is Report.ASLEEP and self._serving.is_set():
                if self._entrance and all(map(self._entrance.takes_back, message.descriptors)):
                    return message
                worker.kill("its process has handed over what is no connection")
            if message.descriptors:
                worker.foreign += message.descriptors
                raise ChannelError(f"a message of kind {message.kind} with descriptors")
            match message.kind:
                case Report.SERVING if not self._serving.is_set():
                    if self.state != "failed":
                        self._become("awake")
                    self._serving.set()
                case Report.STOPPED | Report.FAILED | Report.READY if not self._serving.is_set():
                    return message
                case Report.STOPPED:
                    return message
                case Report.FAILED:
                    self._failure = said_by(message)
                    worker.answer(message)
                case Report.DONE | Report.BUSY | Report.TOLD:
                    worker.answer(message)
                case Report.COUNTED if self._serving.is_set():
                    self._count = min(message.number, _COMMANDS_MAX)
                    worker.counted()
                case _:
                    raise ChannelError(f"a message of kind {message.kind}")
        return None

    def _on_load(self) -> None:
        """The permanent state is read: one that has failed is powered on again.

        It may be heard before SERVING, which comes on another channel.
        """
        if self.state == "failed":
            self._failure = ""
            self._become("awake")
            self._keep()

    def _take_last(self, message: Message | None, vault: Vault) -> None:
        """What its process has said last outlives this manager before that is ended."""
        kind = message and message.kind
        if kind is Report.STOPPED and self._deposits is not None:
            self._deposits.drop(self.entry.id)
        if message is None or kind is not Report.ASLEEP:
            return
        self._connections = message.descriptors
        if vault.closed:
            return
        self._saved = Volatile(message.body, outlives=self._deposits is not None)
        self._watch_data = bool(message.flags & WATCH_DATA)
        self._count = min(message.number, _COMMANDS_MAX)
        self._generation += 1
        self._sleeps += 1
        if self._deposits is not None:
            state: State = "failed" if self.state == "failed" else "asleep"
            self._deposits.put(self._as_saved(vault)._replace(state=state, worker=None))

    def _end_of(self, message: Message | None, worker: WorkerProcess | None, vault: Vault) -> None:
        """What it is behind the end of its process; None: that was another manager's."""
        if self._saved is not None:
            if self.state != "failed":
                self._become("asleep")
            self._watch()
            return
        failure = (
            worker.fault if worker else "its process ended, or was beginning, with the manager"
        )
        if vault.closed or (message and message.kind is Report.STOPPED):
            self._power_off()
            return
        again = self.state == "failed"
        self._failure = failure if message is None else said_by(message)
        log.error("%s: %s; it waits for a reset", self.name, self._failure)
        self._become("failed")
        self._watch_data = True  # clients have gone with the process
        self._keep()
        if again:
            self._all.nursery.start_soon(self._watch_later)
        elif self._entrance is not None and self._entrance.owes:
            self._all.nursery.start_soon(self.wake_for_client)
        else:
            self._watch()

    def _watch(self) -> None:
        ours = () if self._entrance is None else self._entrance.watched(data=self._watch_data)
        watched = (*ours, *self._connections)
        self._all.sleepers.forget(watched)
        try:
            self._all.sleepers.watch(watched, self)
        except OSError as exc:  # the kernel has no room for it now
            log.error("%s: nothing can wake it for a while: %s", self.name, exc.strerror)
            self._all.nursery.start_soon(self._watch_later)

    async def _watch_later(self) -> None:
        await trio.sleep(_AGAIN_SECONDS)
        async with self.turn:
            if self._worker is None and self._entrance is not None:
                self._watch()

    def _power_off(self) -> None:
        """Nothing is left of it but what is on the disk."""
        self._all.sleepers.forget((*self._ours, *self._connections))
        close_all(self._connections)
        if self._saved is not None:
            self._saved.take()
        self._connections, self._saved, self._watch_data = (), None, True
        if self._deposits is not None:
            self._deposits.drop(self.entry.id)
        if self._entrance is not None:
            self._entrance.close()
            self._entrance = None
        if self._vault is not None:
            self._vault.close()
            self._vault = None
        self._failure = ""
        self._become("stopped")
