"""The manager's side of its processes: a zygote, a few blank workers, those that serve."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import os
import resource
import signal
import socket
import subprocess
from collections import deque
from typing import TYPE_CHECKING, Final, NamedTuple

import trio

from vtpm_cuse.client.child import program_environment, program_words
from vtpm_cuse.errors import ChannelError, StorageError
from vtpm_cuse.fleet import lines
from vtpm_cuse.fleet.blocking import close_all
from vtpm_cuse.fleet.channel import Channel
from vtpm_cuse.fleet.heritage import SavedWorker, SavedZygote
from vtpm_cuse.fleet.manager.threads import close_aside, in_thread
from vtpm_cuse.fleet.messages import (
    DESCRIPTORS_MAX,
    Answer,
    Call,
    Message,
    Order,
    Report,
    described,
)
from vtpm_cuse.fleet.states.vault import QUICK
from vtpm_cuse.programs import start_program

if TYPE_CHECKING:
    from collections.abc import Callable
    from threading import Thread

    from vtpm_cuse.fleet.states.vault import Vault

log = logging.getLogger(__name__)

SPARE: Final = 2
"""Blank workers that wait: a TPM wakes in a third of the time of a fork."""
_TRIES: Final = 3
_ZYGOTE: Final = "vtpm_cuse.fleet.zygote"
"""A program of its own: nothing of this process' memory is in a worker."""
_AGAIN_SECONDS: Final = 1.0
_TEXT_MAX: Final = 1000
_DIE_SECONDS: Final = 10.0
"""For the kernel, which takes a process apart in milliseconds."""
_ENDED: Final = "its process has ended"
_FORK_SECONDS: Final = 60.0
"""For the zygote, which takes a millisecond."""
_CHANNELS: Final = 2
"""Of a worker."""
_ROOM_PART: Final = 8
"""What part of all descriptors is left free, unless that is more than one TPM can need."""
_NO_ROOM: Final = Message(Answer.FAILED, described(StorageError("the manager", "has no room")))


class WorkerProcess:
    """A worker, as its manager has it.

    Args:
        pid: Of its process.
        held: The descriptor that means it.
        line: Who has this end can bring it other channels; with the last such end it ends.

    Attributes:
        pid: The same.
        orders: Where it is told what to do, and reports.
        calls: Where it asks for its state.
        ended: Set when nothing more will come of it.
        rested: Set when nobody here uses its channels any more.
        fault: Why it has ended, or was ended.
        foreign: Descriptors that it has sent without being asked for them.
    """

    def __init__(
        self, pid: int, held: int, line: socket.socket, orders: Channel, calls: Channel
    ) -> None:
        self.pid = pid
        self.orders = orders
        self.calls = calls
        self.ended = trio.Event()
        self.rested = trio.Event()
        self.resting = False
        self.fault = _ENDED
        self.foreign: list[int] = []
        self._held = held
        self._line = line
        self._answer: Message | None = None
        self._answered = trio.Event()
        self._counted = trio.Event()
        self._counted.set()

    @property
    def alive(self) -> bool:
        """Of a blank one: whether its end of the channel is there."""
        return not self.orders.is_at_end()

    @classmethod
    def resume(cls, saved: SavedWorker) -> WorkerProcess:
        """That of an earlier manager; where that was killed, it is brought other channels.

        Raises:
            ChannelError: They are none.
            OSError: It has ended.
        """
        line = socket.socket(fileno=saved.line)
        try:
            if saved.channels is None:
                channels = [Channel(end) for end in lines.bring(line, _CHANNELS, lines.TELL)]
            else:
                channels = [Channel.resume(one) for one in saved.channels]
        except (ChannelError, OSError):  # nobody else has it: it is ended, if it has not
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(saved.held, signal.SIGKILL)
            line.close()
            os.close(saved.held)
            raise
        return cls(saved.pid, saved.held, line, *channels)

    def kept(self) -> SavedWorker:
        """What a manager needs of it who comes behind a killed one."""
        return SavedWorker(self.pid, self._held, self._line.fileno(), None)

    def rest(self) -> None:
        """What it asks for from now on is for the next manager."""
        self.resting = True
        self.orders.rest()
        self.calls.rest()

    def suspend(self) -> SavedWorker:
        """It as plain values, and not this manager's any more; once it has `rested`."""
        held, self._held = self._held, -1
        channels = self.orders.suspend(), self.calls.suspend()
        return SavedWorker(self.pid, held, self._line.detach(), channels)

    async def ask(self, order: Order, what: bytes = b"") -> Message | None:
        """DONE, BUSY, FAILED or TOLD, as it answers; None when it has ended, or its TPM sleeps."""
        self._answer, self._answered = None, trio.Event()
        if not self.ended.is_set():
            with contextlib.suppress(OSError):  # its end is on its way here
                await self.orders.send(Message(order, what))
            await self._answered.wait()
        return self._answer

    def answer(self, message: Message | None) -> None:
        """What `ask` waits for."""
        self._answer = message
        self._answered.set()

    async def count(self, seconds: float) -> None:
        """Has it tell how many commands there were; waits so long for that at most.

        Nobody else's order waits for this, and it is asked for nothing more until it has answered.
        """
        if self._counted.is_set() and not self.ended.is_set():
            self._counted = trio.Event()
            with contextlib.suppress(OSError, ChannelError):
                await self.orders.send(Message(Order.COUNT))
        with trio.move_on_after(seconds):
            await self._counted.wait()

    def counted(self) -> None:
        """What `count` waits for."""
        self._counted.set()

    async def watch(self) -> None:
        """Waits for the end of its process; that of its channels may be another's by then."""
        with contextlib.suppress(trio.ClosedResourceError):
            await trio.lowlevel.wait_readable(self._held)
        self._hang_up()

    def kill(self, why: str = "") -> None:
        """It is no more, whatever it wants; who attends to it finds its end, and may tell *why*.

        Also where the kernel cannot end it yet, because it waits for a file of somebody's.
        """
        self.fault = why if why and self.fault is _ENDED else self.fault
        if self._held < 0:
            return
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._held, signal.SIGKILL)
        self._hang_up()

    def _hang_up(self) -> None:
        self.orders.end()
        self.calls.end()

    async def die(self) -> Thread | None:
        """`kill`, and waits until it holds nothing any more of what it was given.

        What it has sent of others is closed; returns who still does so, where they do not let it go.
        """
        self.kill()
        if self._held >= 0:
            with trio.CancelScope(shield=True), trio.move_on_after(_DIE_SECONDS):
                await trio.lowlevel.wait_readable(self._held)
        found = (*self.foreign, *self.orders.take_foreign(), *self.calls.take_foreign())
        self.foreign.clear()
        return await close_aside(found) if found else None

    def end(self) -> None:
        """`kill`, and gives up what belongs to it; once nobody waits for its channels."""
        if self._held >= 0:
            self.kill()
            trio.lowlevel.notify_closing(self._held)
            os.close(self._held)
            self._held = -1
        close_all(tuple(self.foreign))
        self._line.close()
        self.orders.close()
        self.calls.close()
        self.ended.set()
        self._counted.set()
        self.answer(self._answer)


def _has_room(worker: WorkerProcess, count: int) -> bool:
    """Whether so many descriptors can come: the kernel closes silently what does not fit.

    New ones have the lowest numbers that are free, so none above the first that is.
    """
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    first = limit - min(count, DESCRIPTORS_MAX) - min(DESCRIPTORS_MAX, limit // _ROOM_PART)
    try:
        fd = fcntl.fcntl(worker.calls.fileno(), fcntl.F_DUPFD_CLOEXEC, first)
    except OSError:
        return False
    os.close(fd)
    return fd == first


async def keep(worker: WorkerProcess, vault: Vault, on_load: Callable[[], None]) -> None:
    """Answers what a worker asks of its state, until it ends; whoever asks for more is ended."""
    try:
        while (request := await worker.calls.receive()) is not None:
            worker.foreign += request.descriptors
            if request.kind is Call.ROOM:
                answer = Message(Answer.DONE) if _has_room(worker, request.number) else _NO_ROOM
            elif request.kind in QUICK:
                answer = vault.answer_untrusted(request)
                if request.kind is Call.LOAD and request.number == 0:
                    on_load()
            else:
                answer = await in_thread(functools.partial(vault.answer_untrusted, request))
            await worker.calls.send(answer)
    except ChannelError as exc:
        worker.kill(f"its process was ended, for it has asked for {exc}")
    except OSError:  # it has ended
        pass


def said_by(message: Message) -> str:
    """The text of a worker's message, as far as anybody wants to read."""
    return message.body[:_TEXT_MAX].decode(errors="replace")


class _Zygote(NamedTuple):
    pid: int
    channel: Channel

    def end(self) -> None:
        self.channel.close()
        os.kill(
            self.pid, signal.SIGKILL
        )  # a child of this process: it is there until the next line
        os.waitpid(self.pid, 0)


class Workers:
    """Makes them; what runs is in the caller's nursery.

    Args:
        nursery: Where blank ones are made, ahead of time.
        level: Of the log.
        messages: The descriptor that they write it to, if any.
        spare: How many blank ones wait.
    """

    def __init__(
        self, nursery: trio.Nursery, level: int, messages: int | None, spare: int = SPARE
    ) -> None:
        self._nursery = nursery
        self._level = level
        self._messages = subprocess.DEVNULL if messages is None else messages
        self._most = spare
        self._blank: deque[WorkerProcess] = deque()
        self._turn = trio.Lock()
        self._filling = self._closed = False
        self._zygote: _Zygote | None = None
        self._form = b""

    @property
    def zygote_pid(self) -> int | None:
        """Of the zygote, while there is one."""
        return self._zygote.pid if self._zygote else None

    @property
    def form(self) -> str:
        """Of what its workers save; known once it has started."""
        return self._form.decode()

    async def start(self, form: str = "", zygote: SavedZygote | None = None) -> None:
        """Has the first ones ready, of the *zygote* of an earlier manager, if there is one.

        Args:
            form: Of what those saved who serve already, if any do.
            zygote: It makes workers of this form.

        Raises:
            ChannelError: There are none to be had, or only of another form.
            OSError: The same.
        """
        self._form = form.encode()
        if zygote is not None:
            self._zygote = _Zygote(zygote.pid, Channel.resume(zygote.channel))
        self._blank.append(await self._forked())
        self.refill()

    async def take(self) -> WorkerProcess:
        """A blank one; `refill` is for when it has begun. Raises ChannelError, OSError.

        ChannelError: there is none to be had.
        """
        while self._blank:
            found = self._blank.popleft()
            if found.alive:
                return found
            found.end()
        return await self._forked()

    async def renew(self) -> None:
        """A zygote of what is installed now, instead of the one there is; who serves goes on.

        Raises:
            ChannelError: It does not start, or understands nothing of what is saved now; there is
                still the one before.
            OSError: The same.
        """
        new = await self._started_zygote()
        self._forget_zygote()  # who waits for it in vain gives up his turn
        async with self._turn:
            self._forget_zygote()
            self._zygote = new
        while self._blank:
            self._blank.popleft().end()

    async def leave(self) -> tuple[str, SavedZygote | None]:
        """What the next manager begins with: the form of what is saved, and the zygote."""
        self._most, self._closed = 0, True
        async with self._turn:
            zygote, self._zygote = self._zygote, None
        saved = zygote and SavedZygote(zygote.pid, zygote.channel.suspend())
        return self.form, saved

    def close(self) -> None:
        """Ends those that are blank, and the zygote."""
        self._most, self._closed = 0, True
        while self._blank:
            self._blank.popleft().end()
        self._forget_zygote()

    def refill(self) -> None:
        """Has blank ones made; not before who has taken one is served, for that takes a processor."""
        if not self._filling and len(self._blank) < self._most:
            self._filling = True
            self._nursery.start_soon(self._fill_up)

    async def _fill_up(self) -> None:
        try:
            while len(self._blank) < self._most:
                found = await self._forked()
                if len(self._blank) < self._most:
                    self._blank.append(found)
                else:
                    found.end()
        except (ChannelError, OSError) as exc:  # who needs one tries again, and hears of it
            if self._closed:
                return
            log.error("No worker can be made ahead of time: %s", exc)
            await trio.sleep(_AGAIN_SECONDS)
        finally:
            self._filling = False

    async def _forked(self) -> WorkerProcess:
        async with self._turn:
            for _ in range(_TRIES):
                if self._zygote is None and not self._closed:
                    self._zygote = await self._started_zygote()
                zygote = None if self._closed else self._zygote
                if zygote is not None and (found := await _fork(zygote.channel)) is not None:
                    return found
                if self._closed:
                    raise ChannelError("all workers are closed")
                if self._zygote is zygote:
                    log.warning("The process that workers are forked from has ended")
                    self._forget_zygote()
        raise ChannelError("no worker can be started")

    async def _started_zygote(self) -> _Zygote:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            words = [*program_words(_ZYGOTE), str(theirs.fileno()), str(self._level)]
            process = start_program(
                words,
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._messages,
                env=program_environment(),
                start_new_session=True,
            )
        process.returncode = 0  # from here on it is known by its number, to a next manager too
        zygote = _Zygote(process.pid, Channel(ours))
        try:
            with contextlib.suppress(OSError):
                ready = await zygote.channel.receive()
                if ready is not None and ready.kind is Report.READY:
                    self._need_form(ready.body)
                    return zygote
            raise ChannelError("the process that workers are forked from does not start")
        except BaseException:
            zygote.end()
            raise

    def _need_form(self, form: bytes) -> None:
        if self._form not in {b"", form}:
            raise ChannelError(
                "what is installed now cannot go on with what TPMs have saved: stop the manager "
                "and start it again"
            )
        self._form = form

    def _forget_zygote(self) -> None:
        if self._zygote is not None:
            self._zygote.end()
            self._zygote = None


def _is_process(descriptors: tuple[int, ...]) -> bool:
    """Whether that is one, which means a process."""
    try:
        (held,) = descriptors
        os.waitid(os.P_PIDFD, held, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # it is the zygote's
        return True
    except (ValueError, OSError):
        return False
    return True


async def _fork(channel: Channel) -> WorkerProcess | None:
    """A worker; None where the zygote is no more, or is none."""
    answer = None
    line, end = lines.line()
    with contextlib.ExitStack() as undo:
        undo.callback(line.close)
        with end:
            orders, calls = map(undo.enter_context, lines.bring(line, _CHANNELS, lines.TELL))
            try:
                with trio.CancelScope(shield=True):  # else its answer would be the next one's
                    with end:
                        await channel.send(Message(Order.FORK, descriptors=(end.fileno(),)))
                    with trio.move_on_after(_FORK_SECONDS):
                        answer = await channel.receive()
            except (OSError, ChannelError):
                return None
        if answer is None:
            return None
        if answer.kind is not Report.DONE or not _is_process(answer.descriptors):
            close_all(answer.descriptors)
            return None
        undo.pop_all()
    held = answer.descriptors[0]
    return WorkerProcess(answer.number, held, line, Channel(orders), Channel(calls))
