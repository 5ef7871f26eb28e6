"""The trio loop that serves device files on channels to the kernel, of CUSE or FUSE.

Ownership: the loop task owns sessions and device files; the worker thread runs
one job at a time and hands its result back through trio, so no lock is needed.
Between two checkpoints a request is read, answered and its command executed.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

import trio

from vtpm_cuse.errors import DeviceGone
from vtpm_cuse.proto.device import error_reply, unique_of
from vtpm_cuse.serve.managing import begin, manage
from vtpm_cuse.vtpm.file import TpmDeviceFile
from vtpm_cuse.vtpm.managed import ManagedFile
from vtpm_cuse.vtpm.turn import Turn

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vtpm_cuse.proto.device import DeviceSession, SavedDeviceSession
    from vtpm_cuse.serve.worker import Worker
    from vtpm_cuse.vtpm.clients import SavedClients
    from vtpm_cuse.vtpm.ptm import PtmService
    from vtpm_cuse.vtpm.vtpm import Vtpm

log = logging.getLogger(__name__)

_LINGER_SECONDS: Final = 300e-6
"""How long the loop looks for the next request before it sleeps; waking up costs more."""

_CHECKPOINT_EVERY: Final = 32
"""Requests between checkpoints under load, so that signals and jobs get their turn."""

_CANCEL_AGAIN_SECONDS: Final = 0.01

_RELEASE_GRACE_SECONDS: Final = 1.0
"""After PTM_SHUTDOWN: time for the requester to close the device."""


class KernelChannel(Protocol):
    """What gives the kernel's requests and takes the replies."""

    @property
    def fd(self) -> int:
        """The descriptor, non-blocking."""

    @property
    def buffers(self) -> list[memoryview]:
        """Where a request is read to: one buffer, large enough for any."""


class Served(NamedTuple):
    """A channel, and what speaks to the kernel on it."""

    channel: KernelChannel
    session: DeviceSession[Any]


class SavedDevice(NamedTuple):
    """A served device between two commands, as plain values.

    Attributes:
        sessions: Their opens, and the requests that wait.
        response: What is unread of the last response of the device for one client.
        managed: The clients of the other, if there is one.
    """

    sessions: tuple[SavedDeviceSession[Any], ...]
    response: bytes
    managed: SavedClients | None = None


class DeviceServer:
    """Serves a vTPM on channels whose devices exist.

    Args:
        vtpm: The TPM.
        ptm: Answers the ioctls.
        worker: Runs the long commands.
        sessions: Gives the channels for two files: the device for one client, and where *managed*
            the one that gives each client a TPM of its own.
        managed: Whether there is to be one.
        owners: Users who may act as the platform; by default root, and whoever serves it.
    """

    def __init__(
        self,
        vtpm: Vtpm,
        ptm: PtmService,
        worker: Worker,
        sessions: Callable[[TpmDeviceFile, ManagedFile | None], Sequence[Served]],
        *,
        managed: bool = False,
        owners: frozenset[int] | None = None,
    ) -> None:
        owners = frozenset({0, os.geteuid()}) if owners is None else owners
        self._vtpm = vtpm
        self._ptm = ptm
        self._worker = worker
        self._resumed = False
        self._turn = turn = Turn(worker.submit)
        self._file = TpmDeviceFile(vtpm, ptm, turn, self._wake, owners)
        self._managed: ManagedFile | None = None
        if managed:
            self._managed = ManagedFile(vtpm, manage(ptm), turn, self._wake)
        self._served = tuple(sessions(self._file, self._managed))
        self._scope = trio.CancelScope()
        self._over = False

    async def suspend(self) -> SavedDevice:
        """The device as plain values, when the command that runs has been ended early; it serves no more."""
        await self.settle()
        return self._suspended()

    def suspend_at_rest(self) -> SavedDevice | None:
        """As `suspend`; None, with nothing done, where a client is in the middle of something."""
        files = (self._file, self._managed)
        rest = all(file is None or file.at_rest for file in files) and not self._turn.taken
        if not rest or not all(session.at_rest for _, session in self._served):
            return None
        return self._suspended()

    def _suspended(self) -> SavedDevice:
        self._over = True  # also for a request that has woken it, but was not read yet
        self._scope.cancel()
        sessions = tuple(session.suspend() for _, session in self._served)
        managed = None if self._managed is None else self._managed.managed.suspend()
        return SavedDevice(sessions, bytes(self._file.response), managed)

    def resume(self, saved: SavedDevice) -> None:
        """Goes on where *saved* was suspended; called once, before `serve`."""
        self._resumed = True
        self._file.response = memoryview(saved.response)
        if self._managed is not None and saved.managed is not None:
            self._managed.managed.resume(saved.managed)
        for (_, session), known in zip(self._served, saved.sessions, strict=True):
            session.resume(known)

    def take_over(self, first_handle: int) -> None:
        """Goes on for a server that has died; see `DeviceSession.take_over`. In place of `resume`."""
        for channel, session in self._served:
            with contextlib.suppress(OSError):
                os.write(channel.fd, session.take_over(first_handle))

    async def serve(self) -> None:
        """Until PTM_SHUTDOWN, or until another process has the state.

        Raises:
            DeviceGone: The kernel took the device away.
        """
        if self._managed is not None and not self._resumed:
            begin(self._managed.managed, self._worker, borrowed=self._vtpm.borrowed)
        with self._scope:
            await self._serve()

    async def _serve(self) -> None:
        looked_at, until_checkpoint, linger_until = self._served, _CHECKPOINT_EVERY, 0.0
        while not self._over and not (self._ptm.shutdown_requested and not self._file.is_open):
            answered = 0
            for served in looked_at:
                answered += self._answer_one(served)
            if answered:
                until_checkpoint -= answered
                linger_until = time.perf_counter() + _LINGER_SECONDS
                if len(self._served) > 1:  # what nobody has open is looked at now and then
                    looked_at = tuple(one for one in self._served if one.session.is_open)
            elif time.perf_counter() < linger_until:
                os.sched_yield()  # on one processor, to the client
                continue
            else:
                await self._wait_for_request()
                looked_at = self._served
            if until_checkpoint <= 0:
                await trio.lowlevel.checkpoint()
                looked_at, until_checkpoint = self._served, _CHECKPOINT_EVERY

    def _answer_one(self, served: Served) -> int:
        """How many requests there were: one or none. Raises DeviceGone."""
        channel, session = served
        try:
            size = os.readv(channel.fd, channel.buffers)
        except BlockingIOError:
            return 0
        except OSError as exc:
            if exc.errno == errno.ENODEV:
                raise DeviceGone("The kernel has taken the device away") from exc
            if exc.errno in {errno.ENOENT, errno.EINTR}:  # the request was withdrawn
                return 1
            raise
        self._answer(channel, session, channel.buffers[0][:size])
        return 1

    async def _wait_for_request(self) -> None:
        if not self._file.cancelling:
            await self._wait_readable()
            return
        self._vtpm.cancel()
        with trio.move_on_after(_CANCEL_AGAIN_SECONDS):
            await self._wait_readable()

    async def _wait_readable(self) -> None:
        if len(self._served) == 1:
            await trio.lowlevel.wait_readable(self._served[0].channel.fd)
            return
        async with trio.open_nursery() as nursery:

            async def wait(fd: int) -> None:
                await trio.lowlevel.wait_readable(fd)
                nursery.cancel_scope.cancel()

            for served in self._served:
                nursery.start_soon(wait, served.channel.fd)

    def _answer(
        self, channel: KernelChannel, session: DeviceSession[Any], message: memoryview
    ) -> None:
        """One request. The device outlives a bug of ours: the client gets EIO, the log the story."""
        try:
            reply = session.receive(message)
        except Exception:
            log.exception("A request could not be handled")
            reply = error_reply(unique_of(message), errno.EIO)
        if reply is not None:
            self._send(channel, reply)
        if self._file.pending is not None:
            if self._managed is not None:
                self._managed.managed.share()
            self._file.run_pending()
        if self._managed is not None:
            self._managed.run_pending()
        if self._ptm.shutdown_requested:
            self._give_grace()

    def _wake(self) -> None:
        if self._vtpm.state_lost:  # whoever waits for an answer hears that the device is gone
            self._scope.cancel()
            return
        for channel, session in self._served:
            try:
                for message in session.wake():
                    self._send(channel, message)
            except Exception:  # called from trio's own machinery, which must not see it
                log.exception("A waiting request could not be answered")
        if self._ptm.shutdown_requested:
            self._give_grace()

    def _give_grace(self) -> None:
        if self._scope.deadline == float("inf"):
            self._scope.deadline = trio.current_time() + _RELEASE_GRACE_SECONDS

    @staticmethod
    def _send(channel: KernelChannel, message: bytes) -> None:
        try:
            os.write(channel.fd, message)
        except OSError as exc:
            # ENOENT: the client is gone. ENODEV: so is the device; the next read says so.
            if exc.errno not in {errno.ENOENT, errno.ENODEV}:
                log.warning("The kernel did not take a reply: %s", exc.strerror)

    async def settle(self) -> None:
        """Ends a running command early and waits for it; it is never abandoned."""
        with trio.CancelScope(shield=True):
            while self._turn.taken:
                self._vtpm.abort()
                await trio.sleep(_CANCEL_AGAIN_SECONDS)
