"""A blank process that becomes one TPM, for as long as somebody uses it.

Forked from the zygote, it goes into its sandbox, waits for the one TPM that it will ever serve, and
ends with it: what libtpms and Python leave in memory, nobody else's TPM comes into. It opens no
path. Descriptors, state and volatile state are given to it, and go back when the TPM sleeps.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import select
from typing import TYPE_CHECKING, Final

import trio

from vtpm_cuse import faults
from vtpm_cuse.config import (
    LocalityConfig,
    ProcessConfig,
    ProfileConfig,
    StartupConfig,
    VtpmConfig,
)
from vtpm_cuse.errors import ChannelError, DeviceError, EngineError, TpmUnavailable, VtpmError
from vtpm_cuse.fleet.blocking import close_all
from vtpm_cuse.fleet.messages import Message, Order, Report
from vtpm_cuse.fleet.tasks import IN_ORDER, MAKE, OFF, ON, RESUME, Task
from vtpm_cuse.fleet.worker import clock, rehearsal
from vtpm_cuse.fleet.worker.hearing import Hearing
from vtpm_cuse.fleet.worker.saved import SavedTpm, connections_of, packed, unpacked
from vtpm_cuse.fleet.worker.serving import clients_of, flags_of
from vtpm_cuse.fleet.worker.store import MessageStore
from vtpm_cuse.serve.worker import Worker
from vtpm_cuse.service.compose import make_vtpm_on, power_on
from vtpm_cuse.service.confine import landlock, sandbox
from vtpm_cuse.vtpm.facts import TpmFacts
from vtpm_cuse.vtpm.ptm import PtmService
from vtpm_cuse.wire.tpm import TpmSu

if TYPE_CHECKING:
    import socket

    from vtpm_cuse.fleet.worker.rehearsal import Practice
    from vtpm_cuse.fleet.worker.serving import Clients, SavedServer, Server
    from vtpm_cuse.fleet.worker.store import Managers
    from vtpm_cuse.service.confine.seccomp import Filter
    from vtpm_cuse.vtpm.vtpm import Vtpm

log = logging.getLogger(__name__)

_REHEARSALS: Final = 20
"""So often CPython 3.11 looks at code, and more, before it has all of that in its faster form."""
_LOOKS: Final = 4
"""How often a worker looks, in the time after which a TPM that nobody uses sleeps."""


def prepare() -> Practice | None:
    """In the zygote: does all that a worker does, often, for nobody; see `rehearsal`.

    Returns:
        What `run` needs to do the same; None where that is not to be, which costs time alone.
    """
    try:
        return rehearsal.prepare(_idle, _REHEARSALS)
    except Exception as exc:
        log.warning("TPMs wake slowly, for it cannot be rehearsed: %r", exc)
        return None


def run(line: socket.socket, rules: Filter | None, practice: Practice | None) -> None:
    """Lives, in a process of its own; returns when that is to end."""
    trio.run(_live, Hearing(line), rules, practice)


async def _live(hearing: Hearing, rules: Filter | None, practice: Practice | None) -> None:
    if practice is not None:
        await _rehearse(practice)
    with contextlib.suppress(landlock.LandlockMissing):  # the zygote has said so
        landlock.restrict({})  # once more: workers are out of each other's reach, too
    with select.epoll() as epoll:  # of this process alone, and the sandbox allows no more of them
        worker = sandbox.seal(ProcessConfig(), rules, Worker)
        try:
            await _obey(hearing, hearing, worker, epoll)
        except (ChannelError, OSError) as exc:
            log.warning("The manager has gone: %s", exc)
        finally:
            worker.close()


async def _rehearse(practice: Practice) -> None:
    try:
        await rehearsal.wake(_idle, practice)
    except Exception as exc:  # it is practice
        log.warning("A worker begins slowly, for it has not rehearsed: %r", exc)
    practice.listener.close()


async def _idle(hearing: Hearing, managers: Managers) -> None:
    """A worker that is given no command that takes long."""
    with select.epoll() as epoll:
        await _obey(hearing, managers, Worker(begun=False), epoll)


async def _obey(hearing: Hearing, managers: Managers, worker: Worker, epoll: select.epoll) -> None:
    order = await hearing.receive()
    if order is not None and order.kind is Order.SERVE:
        await _serve(order, hearing, managers, worker, epoll)
        await _be_ended(hearing)


async def _be_ended(hearing: Hearing) -> None:
    """What was said last has been heard, and is safe, when a manager ends this process."""
    while await hearing.receive() is not None:
        pass


async def _serve(
    order: Message, hearing: Hearing, managers: Managers, worker: Worker, epoll: select.epoll
) -> None:
    task = Task.unpack(order.body)
    store = MessageStore(managers, task.permanent)
    profile = None if task.profile is None else ProfileConfig(task.profile)
    startup = StartupConfig(not_need_init=order.flags != OFF, startup="clear")
    of_kernel = task.interface == "vtpm-proxy"
    locality = LocalityConfig(allow_set_locality=of_kernel)
    config = VtpmConfig(tpm2=True, startup=startup, profile=profile, locality=locality)
    saved = unpacked(task.saved, order.descriptors) if task.saved else None
    try:
        vtpm = make_vtpm_on(config, store)
        if saved is not None:
            told = clock.awake if order.flags == RESUME else clock.as_new
            vtpm.resume(saved.vtpm._replace(volatile=told(saved.vtpm.volatile, saved.since)))
        else:
            power_on(vtpm, config)
        if of_kernel and order.flags == ON:
            vtpm.self_test()  # the kernel begins with one, for which it does not wait long
        made = _made(vtpm) if order.flags == MAKE else b""
    except VtpmError as exc:
        await hearing.say(_failed(exc), lasts=True)
        return
    if order.flags == MAKE:
        await hearing.say(Message(Report.STOPPED, made), lasts=True)
        return
    store.forget()
    off = not vtpm.running
    if off:  # before a client can reset it, of which the manager then hears
        await hearing.say(Message(Report.SERVING), lasts=True)
    clients = clients_of(task, order.flags, order.descriptors, worker, epoll)
    served = _Served(vtpm, store, hearing, clients, task.idle, begun=off)
    try:
        await served.serve(None if saved is None else saved.served)
    finally:
        vtpm.stop(orderly=False)  # one to practise with: another one comes into this process


def _made(vtpm: Vtpm) -> bytes:
    """What one that is powered on for the first time goes on from, in another process."""
    begin = clock.now()
    saved = vtpm.suspend()
    return packed(SavedTpm(None, saved, clock.asleep_since(saved.volatile, begin)))[0]


def _failed(exc: VtpmError) -> Message:
    said = exc.reason if isinstance(exc, TpmUnavailable) else faults.sentence(exc)
    return Message(Report.FAILED, said.encode())


class _Served:
    """The TPM while it is here."""

    def __init__(
        self,
        vtpm: Vtpm,
        store: MessageStore,
        hearing: Hearing,
        clients: Clients,
        idle: float,
        *,
        begun: bool,
    ) -> None:
        self._vtpm = vtpm
        self._store = store
        self._hearing = hearing
        self._clients = clients
        self._idle = idle
        self._saved: SavedServer | None = None
        self._asked = Message(Order.STOP)
        self._looks, self._seen, self._due = 0, -1, 0.0
        self._begun = begun  # and the manager knows
        self._gone = False

    async def serve(self, saved: SavedServer | None) -> None:
        """Until it sleeps or ends."""
        while True:
            ptm = PtmService(self._vtpm, self._vtpm.close)
            async with trio.open_nursery() as nursery:
                server = self._clients.serve(nursery, ptm, saved)
                nursery.start_soon(self._attend, server, nursery.cancel_scope)
            if self._gone:
                self._clients.close()
                return
            saved, self._saved = self._saved, None
            if saved is None:
                break
            if self._asked.kind is Order.RESET:
                await self._hearing.say(self._reset())
            elif self._asked.kind is Order.LOOK:
                await self._hearing.say(self._look(self._asked.body))
            elif await self._fell_asleep(saved):
                return
        lost = self._vtpm.state_lost
        self._vtpm.close()
        self._clients.close()
        report = Message(Report.FAILED, b"another process has its state")
        await self._hearing.say(report if lost else Message(Report.STOPPED), lasts=True)

    async def _attend(self, server: Server, scope: trio.CancelScope) -> None:
        """Obeys, and finds out when nobody uses the TPM."""
        if not self._begun:
            self._begun = True
            await trio.lowlevel.checkpoint()  # what has come is answered first
            await self._hearing.say(Message(Report.SERVING), lasts=True)
        while True:
            if (left := self._due - trio.current_time()) <= 0:
                self._looks = self._looks + 1 if self._seen == self._vtpm.commands else 0
                self._seen, self._due = self._vtpm.commands, self._due - left + self._idle / _LOOKS
                if self._looks >= _LOOKS and await self._suspend(server, Message(Order.SLEEP)):
                    return
                continue
            order: Message | None = None
            with trio.move_on_after(left) as waited:
                order = await self._hearing.receive()
            if waited.cancelled_caught:
                continue
            if order is None or order.kind is Order.STOP:
                self._gone = order is None
                scope.cancel()
                return
            if order.kind is Order.COUNT:
                await self._hearing.say(Message(Report.COUNTED, number=self._vtpm.commands))
                continue
            if await self._suspend(server, order):
                return
            await self._hearing.say(Message(Report.BUSY))

    async def _suspend(self, server: Server, order: Message) -> bool:
        """Whether it has ended what serves, for the sake of *order*."""
        if order.kind is Order.RESET:
            self._saved = await server.suspend()
        elif order.kind in {Order.SLEEP, Order.LOOK} and self._vtpm.at_rest:
            self._saved = server.suspend_at_rest()
        if self._saved is None:
            return False
        self._asked = order
        return True

    def _look(self, what: bytes) -> Message:
        """What the TPM says of itself, or the number of an error; no command runs."""
        try:
            return Message(Report.TOLD, TpmFacts(self._vtpm).read(what.decode(errors="replace")))
        except DeviceError as exc:
            return Message(Report.TOLD, flags=exc.errno)
        except VtpmError:
            return Message(Report.TOLD, flags=errno.EIO)

    def _reset(self) -> Message:
        vtpm = self._vtpm
        try:
            vtpm.start()
            vtpm.startup(TpmSu.TPM_SU_CLEAR)
        except VtpmError as exc:  # it is off, and says so to whoever asks
            return _failed(exc)
        return Message(Report.DONE)

    async def _fell_asleep(self, served: SavedServer) -> bool:
        begin = clock.now()
        saved = None
        if (count := connections_of(served)) and not self._store.has_room(count):
            log.warning("The TPM stays awake: too many files are open for its clients' connections")
        else:
            try:
                saved = self._vtpm.suspend(in_order=self._asked.body == IN_ORDER)
            except EngineError as exc:  # it runs on
                log.warning("The TPM stays awake: %s", exc)
        if saved is None:
            self._looks = 0
            await self._hearing.say(Message(Report.BUSY))
            return False
        since = clock.asleep_since(saved.volatile, begin)
        data, descriptors = packed(SavedTpm(served, saved, since))
        flags, commands = flags_of(served), self._vtpm.commands
        report = Message(Report.ASLEEP, data, flags, commands, descriptors)
        await self._hearing.say(report, lasts=True)
        await _be_ended(self._hearing)
        close_all(descriptors)
        self._clients.close(served)
        return True
