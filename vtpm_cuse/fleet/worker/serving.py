"""What serves a TPM's clients in its worker, as its interface has it: sockets, or a device."""

from __future__ import annotations

import contextlib
import logging
import os
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from vtpm_cuse.acquire.chardev import ProxyDevice
from vtpm_cuse.acquire.cuse import CuseChannel
from vtpm_cuse.acquire.endpoints import Endpoints
from vtpm_cuse.acquire.mount import FuseMount
from vtpm_cuse.errors import DeviceGone
from vtpm_cuse.fleet.blocking import close_all
from vtpm_cuse.fleet.tasks import FUSE_FILES, OFF, WATCH_DATA
from vtpm_cuse.proto.device import DeviceSession
from vtpm_cuse.proto.fuse import FileOwnership, FuseSession
from vtpm_cuse.serve.connections import adopted
from vtpm_cuse.serve.device import DeviceServer, SavedDevice, Served
from vtpm_cuse.serve.sockets import SavedSockets, SocketServer
from vtpm_cuse.wire.tpm import TpmRc, response

if TYPE_CHECKING:
    import select
    from collections.abc import Callable

    import trio

    from vtpm_cuse.fleet.tasks import Task
    from vtpm_cuse.proto.device import DeviceFile
    from vtpm_cuse.serve.worker import Worker
    from vtpm_cuse.vtpm.file import TpmDeviceFile
    from vtpm_cuse.vtpm.managed import ManagedFile
    from vtpm_cuse.vtpm.ptm import PtmService

log = logging.getLogger(__name__)

SavedServer = SavedSockets | SavedDevice

_FILE_MODE: Final = 0o600
_HANDLES_OF_ONE: Final = 1 << 32
"""That a worker may give, of opens of its device."""


class Server(Protocol):
    """It serves until its nursery is cancelled, or cancels that: at the end, or suspended."""

    async def suspend(self) -> SavedServer:
        """What it is as plain values, when no command runs any more."""

    def suspend_at_rest(self) -> SavedServer | None:
        """The same now; None, with nothing done, where a client is in the middle of something."""


class Clients(Protocol):
    """How they come to the TPM."""

    def serve(self, nursery: trio.Nursery, ptm: PtmService, saved: SavedServer | None) -> Server:
        """Begins, or goes on where *saved* was suspended."""

    def close(self, saved: SavedServer | None = None) -> None:
        """Nothing of where they come in is held any more, nor of what was suspended and told of."""


def clients_of(
    task: Task, mode: int, descriptors: tuple[int, ...], worker: Worker, epoll: select.epoll
) -> Clients:
    """As *task* has them, with the descriptors that came with it, and *epoll* for sockets."""
    if task.interface == "socket":
        return _SocketClients(descriptors, worker, epoll)
    if task.interface == "vtpm-proxy":
        return _KernelClient(descriptors, worker, dead=mode == OFF)
    first_handle = task.generation * _HANDLES_OF_ONE if mode == OFF else 0
    channels = _in_mount if task.interface == "fuse" else _of_cuse
    return _DeviceClients(channels(descriptors, task.owner), worker, task.owner, first_handle)


def flags_of(saved: SavedServer) -> int:
    """Of ASLEEP."""
    waits = isinstance(saved, SavedSockets) and saved.accepted is not None and saved.accepted.known
    return 0 if waits else WATCH_DATA


def _listeners_of(saved: SavedSockets) -> tuple[int, ...]:
    """Their descriptors; those that there are."""
    managed = None if saved.managed is None else saved.managed.listener
    found = saved.data_listener, saved.control_listener, managed
    return tuple(fd for fd in found if fd is not None)


class _SocketClients:
    def __init__(self, listeners: tuple[int, ...], worker: Worker, epoll: select.epoll) -> None:
        self._listeners, self._worker, self._epoll = listeners, worker, epoll
        self._endpoints = Endpoints()

    def serve(
        self, nursery: trio.Nursery, ptm: PtmService, saved: SavedServer | None
    ) -> SocketServer:
        self._endpoints = endpoints = Endpoints(passed_too=True)
        endpoints.epoll = self._epoll
        server = SocketServer(nursery, endpoints, ptm, self._worker)
        if isinstance(saved, SavedSockets):
            server.resume(saved)
        else:
            endpoints.data_listener, endpoints.control_listener, endpoints.managed_listener = map(
                adopted, self._listeners
            )
            server.start()
        return server

    def close(self, saved: SavedServer | None = None) -> None:
        self._endpoints.close()
        if isinstance(saved, SavedSockets):
            close_all(_listeners_of(saved))


class _KernelClient:
    """The kernel, which has a TPM device of its own on one descriptor.

    Args:
        descriptors: That one.
        worker: Runs the long commands.
        dead: Who served it has died, and may owe an answer.
    """

    def __init__(self, descriptors: tuple[int, ...], worker: Worker, *, dead: bool) -> None:
        (self._fd,) = descriptors
        self._worker, self._dead = worker, dead
        self._endpoints = Endpoints()

    def serve(
        self, nursery: trio.Nursery, ptm: PtmService, saved: SavedServer | None
    ) -> SocketServer:
        self._endpoints = endpoints = Endpoints()
        server = SocketServer(nursery, endpoints, ptm, self._worker)
        if isinstance(saved, SavedSockets):
            server.resume(saved)
            return server
        if self._dead:
            with contextlib.suppress(OSError):  # it waits for none
                os.write(self._fd, response(TpmRc.TPM_RC_FAILURE, tpm2=True))
        endpoints.data_stream = ProxyDevice(self._fd)
        server.start()
        return server

    def close(self, saved: SavedServer | None = None) -> None:
        self._endpoints.close()
        if saved is not None:
            close_all((self._fd,))


class _Channels(NamedTuple):
    """Of a device and a managed one, and what speaks on them."""

    ours: tuple[CuseChannel | FuseMount, ...]
    serve: Callable[[TpmDeviceFile, ManagedFile], list[Served]]


def _of_cuse(descriptors: tuple[int, ...], _owner: int) -> _Channels:
    channels = tuple(map(CuseChannel, descriptors))

    def serve(file: TpmDeviceFile, managed: ManagedFile) -> list[Served]:
        files: tuple[DeviceFile[Any], ...] = (file, managed)
        return [
            Served(channel, DeviceSession(found))
            for channel, found in zip(channels, files, strict=True)
        ]

    return _Channels(channels, serve)


def _in_mount(descriptors: tuple[int, ...], owner: int) -> _Channels:
    mount = FuseMount.adopt("", descriptors[0])
    ownership = FileOwnership(owner, os.getgid(), _FILE_MODE, 0)

    def serve(file: TpmDeviceFile, managed: ManagedFile) -> list[Served]:
        devices: dict[str, DeviceFile[Any]] = dict(zip(FUSE_FILES, (file, managed), strict=True))
        return [Served(mount, FuseSession(devices, _NoTexts(), ownership))]

    return _Channels((mount,), serve)


class _NoTexts:
    """There is nothing beside the devices (implements `proto.fuse.Texts`): a sleeper shows none."""

    def files(self, folder: str) -> tuple[str, ...]:
        _ = folder
        return ()

    def folders(self) -> tuple[str, ...]:
        return ()

    def size(self, path: str) -> int | None:
        _ = path
        return None

    def read(self, path: str) -> bytes | None:
        _ = path
        return b""


class _DeviceClients:
    def __init__(self, channels: _Channels, worker: Worker, owner: int, first_handle: int) -> None:
        self._channels = channels
        self._worker = worker
        self._owners = frozenset({0, owner})
        self._first_handle = first_handle

    def serve(
        self, nursery: trio.Nursery, ptm: PtmService, saved: SavedServer | None
    ) -> DeviceServer:
        server = DeviceServer(
            *(ptm.vtpm, ptm, self._worker, self._sessions), managed=True, owners=self._owners
        )
        if isinstance(saved, SavedDevice):
            server.resume(saved)
        elif self._first_handle:
            server.take_over(self._first_handle)
        nursery.start_soon(self._run, server, nursery.cancel_scope)
        return server

    def _sessions(self, file: TpmDeviceFile, managed: ManagedFile | None) -> list[Served]:
        assert managed is not None  # noqa: S101  it is asked for
        return self._channels.serve(file, managed)

    @staticmethod
    async def _run(server: DeviceServer, scope: trio.CancelScope) -> None:
        try:
            with contextlib.suppress(DeviceGone):
                await server.serve()
        finally:
            await server.settle()
            scope.cancel()

    def close(self, saved: SavedServer | None = None) -> None:
        _ = saved  # its clients are all on the channels
        for channel in self._channels.ours:
            channel.close()
