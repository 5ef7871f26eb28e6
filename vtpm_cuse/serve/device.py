"""The trio loop that serves a device file on a channel to the kernel, of CUSE or FUSE.

Ownership: the loop task owns session and device file; the worker thread runs
one job at a time and hands its result back through trio, so no lock is needed.
Between two checkpoints a request is read, answered and its command executed.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import trio

from vtpm_cuse.errors import DeviceGone
from vtpm_cuse.proto.device import DeviceSession, error_reply, unique_of
from vtpm_cuse.vtpm.file import TpmDeviceFile

if TYPE_CHECKING:
    from collections.abc import Callable

    from vtpm_cuse.proto.device import SavedSession
    from vtpm_cuse.serve.worker import Worker
    from vtpm_cuse.vtpm.file import SavedOpen
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


class SavedDevice(NamedTuple):
    """A served device between two commands, as plain values.

    Attributes:
        session: Its opens, and the requests that wait.
        response: What is unread of the last response.
    """

    session: SavedSession[SavedOpen]
    response: bytes


class DeviceServer:
    """Serves a vTPM on a channel whose device exists.

    Args:
        channel: To the kernel.
        vtpm: The TPM.
        ptm: Answers the ioctls.
        worker: Runs the long commands.
        make_session: Makes what speaks to the kernel for the device file.
    """

    def __init__(
        self,
        channel: KernelChannel,
        vtpm: Vtpm,
        ptm: PtmService,
        worker: Worker,
        make_session: Callable[[TpmDeviceFile], DeviceSession[SavedOpen]] = DeviceSession,
    ) -> None:
        self._channel = channel
        self._vtpm = vtpm
        self._ptm = ptm
        owners = frozenset({0, os.geteuid()})
        self._file = TpmDeviceFile(vtpm, ptm, worker.submit, self._wake, owners)
        self._session = make_session(self._file)
        self._scope = trio.CancelScope()

    def suspend(self) -> SavedDevice:
        """The device as plain values; no command runs, and this server is not used any more."""
        return SavedDevice(self._session.suspend(), bytes(self._file.response))

    def resume(self, saved: SavedDevice) -> None:
        """Goes on where *saved* was suspended; called once, before `serve`."""
        self._file.response = memoryview(saved.response)
        self._session.resume(saved.session)

    async def serve(self) -> None:
        """Until PTM_SHUTDOWN, or until another process has the state.

        Raises:
            DeviceGone: The kernel took the device away.
        """
        with self._scope:
            await self._serve()

    async def _serve(self) -> None:
        fd, buffers = self._channel.fd, self._channel.buffers
        served, linger_until = 0, 0.0
        while not (self._ptm.shutdown_requested and not self._file.is_open):
            try:
                size = os.readv(fd, buffers)
            except BlockingIOError:
                if time.perf_counter() < linger_until:
                    os.sched_yield()  # on one processor, to the client
                else:
                    await self._wait_for_request()
                continue
            except OSError as exc:
                if exc.errno == errno.ENODEV:
                    raise DeviceGone("The kernel has taken the device away") from exc
                if exc.errno in {errno.ENOENT, errno.EINTR}:  # the request was withdrawn
                    continue
                raise
            self._answer(buffers[0][:size])
            served += 1
            if served % _CHECKPOINT_EVERY == 0:
                await trio.lowlevel.checkpoint()
            linger_until = time.perf_counter() + _LINGER_SECONDS

    async def _wait_for_request(self) -> None:
        if not self._file.cancelling:
            await trio.lowlevel.wait_readable(self._channel.fd)
            return
        self._vtpm.cancel()
        with trio.move_on_after(_CANCEL_AGAIN_SECONDS):
            await trio.lowlevel.wait_readable(self._channel.fd)

    def _answer(self, message: memoryview) -> None:
        """One request. The device outlives a bug of ours: the client gets EIO, the log the story."""
        try:
            reply = self._session.receive(message)
        except Exception:
            log.exception("A request could not be handled")
            reply = error_reply(unique_of(message), errno.EIO)
        if reply is not None:
            self._send(reply)
        if self._file.pending is not None:
            self._file.run_pending()
        if self._ptm.shutdown_requested:
            self._give_grace()

    def _wake(self) -> None:
        if self._vtpm.state_lost:  # whoever waits for an answer hears that the device is gone
            self._scope.cancel()
            return
        try:
            for message in self._session.wake():
                self._send(message)
        except Exception:  # called from trio's own machinery, which must not see it
            log.exception("A waiting request could not be answered")
        if self._ptm.shutdown_requested:
            self._give_grace()

    def _give_grace(self) -> None:
        if self._scope.deadline == float("inf"):
            self._scope.deadline = trio.current_time() + _RELEASE_GRACE_SECONDS

    def _send(self, message: bytes) -> None:
        try:
            os.write(self._channel.fd, message)
        except OSError as exc:
            # ENOENT: the client is gone. ENODEV: so is the device; the next read says so.
            if exc.errno not in {errno.ENOENT, errno.ENODEV}:
                log.warning("The kernel did not take a reply: %s", exc.strerror)

    async def settle(self) -> None:
        """Ends a running command early and waits for it; it is never abandoned."""
        with trio.CancelScope(shield=True):
            while self._file.busy:
                self._vtpm.abort()
                await trio.sleep(_CANCEL_AGAIN_SECONDS)
