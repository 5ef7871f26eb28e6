"""Where the clients of a TPM come in while that is on: its sockets, or its device."""

from __future__ import annotations

import contextlib
import os
import socket
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import trio

from vtpm_cuse.acquire.sockets import acquire
from vtpm_cuse.config import SocketAddress, SocketConfig, VtpmConfig
from vtpm_cuse.files import make_folder
from vtpm_cuse.fleet.channel import close_all
from vtpm_cuse.fleet.opener import Wanted
from vtpm_cuse.fleet.tasks import FUSE_FILES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from vtpm_cuse.fleet.base import Interface, SocketKind
    from vtpm_cuse.fleet.opener import MakesDevices, Mounted

SOCKETS: Final[dict[SocketKind, str]] = {
    "data": "data",
    "control": "data.ctrl",
    "managed": "managed",
}
"""Their names in a TPM's folder: as tpm2-tss has it, the control channel is beside the data's."""

_SOCKET_MODE: Final = 0o600
_FOLDER_MODE: Final = 0o711
"""Others pass through it to what is theirs."""


class Places(NamedTuple):
    """The paths at which clients find a TPM; see `fleet.base.Tpm`."""

    sockets: Mapping[SocketKind, str]
    device: str | None = None
    managed_device: str | None = None


def places(interface: Interface, name: str, folder: str) -> Places:
    """Those of TPM *name*, whose folder for sockets is *folder*."""
    match interface:
        case "socket":
            return Places({kind: os.path.join(folder, file) for kind, file in SOCKETS.items()})
        case "fuse":
            return Places({}, *(os.path.join(folder, file) for file in FUSE_FILES))
        case "cuse":
            return Places({}, *(f"/dev/{device}" for device in _devices(name)))


def _devices(name: str) -> tuple[str, str]:
    """No rule of udev for TPMs knows them, and no two TPMs have one of them."""
    return f"vtpmd-{name}", f"vtpmdrm-{name}"


class Entrance(Protocol):
    """What is held open for clients, whoever serves them.

    Attributes:
        descriptors: What a worker is given first. They stay ours.
        gone: Set when clients find nothing any more, after `close`.
        owes: A dead worker's calls wait for answers that another one can give.
    """

    owes: bool
    descriptors: tuple[int, ...]
    gone: trio.Event

    def watched(self, *, data: bool) -> tuple[int, ...]:
        """On which of them something may come for one that sleeps: with *data*, on all."""

    def takes_back(self, fd: int) -> bool:
        """Whether a worker may hand *fd* back with its TPM, as what it had besides."""

    def leave(self) -> int | None:
        """Its `descriptors` are somebody else's from now on; and its mount, by this number."""

    def close(self) -> None:
        """What is held of it is let go."""


class SocketEntrance:
    """Three listeners, and the connections of their clients (implements `Entrance`).

    Args:
        folder: Of their paths.
        owner: Whose they are.
        left: Their descriptors, where an earlier manager has made them.

    Raises:
        VtpmError: They cannot be had.
        OSError: The same.
    """

    owes = False

    def __init__(self, folder: str, owner: int, left: tuple[int, ...] = ()) -> None:
        self._folder = folder
        self.gone = trio.Event()
        make_folder(folder, _FOLDER_MODE, umask=False)
        uid = None if owner == os.geteuid() else owner
        paths = places("socket", "", folder).sockets.values()
        data, control, managed = (*(SocketAddress("unixio", fd=fd) for fd in left),) or (
            *(SocketAddress("unixio", path=path, mode=_SOCKET_MODE, uid=uid) for path in paths),
        )
        self._endpoints = found = acquire(SocketConfig(VtpmConfig(), data, control, managed))
        for path in paths if left else ():
            found.own(path)
        listeners = found.data_listener, found.control_listener, found.managed_listener
        self.descriptors = tuple(one.fileno() for one in listeners if one is not None)

    def watched(self, *, data: bool) -> tuple[int, ...]:
        """Without the first, whose next client waits for the one before."""
        return self.descriptors if data else self.descriptors[1:]

    def takes_back(self, fd: int) -> bool:
        """A connected socket; of nothing else is anything asked here, which may wait."""
        own = os.dup(fd)
        try:
            found = socket.socket(fileno=own)
        except OSError:
            os.close(own)
            return False
        with found:
            return not found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)

    def leave(self) -> None:
        """See `Entrance`."""
        found = self._endpoints
        found.give_up_paths()
        for one in (found.data_listener, found.control_listener, found.managed_listener):
            if one is not None:
                one.detach()

    def close(self) -> None:
        """Their paths go, too."""
        self.descriptors = ()
        self._endpoints.close()
        with contextlib.suppress(OSError):
            os.rmdir(self._folder)
        self.gone.set()


class DeviceEntrance:
    """The channels of its devices, which are there as long as these (implements `Entrance`).

    Args:
        channels: Their descriptors.
        leave: Called when they are closed, where that is not yet the end of all: it sets `gone`.
        mount: Its number, of a FUSE mount.
    """

    owes = True

    def __init__(
        self,
        channels: tuple[int, ...],
        leave: Callable[[], None] | None = None,
        mount: int | None = None,
    ) -> None:
        self.descriptors = channels
        self._mount = mount
        self.gone = trio.Event()
        self._leave = leave or self.gone.set

    def watched(self, *, data: bool) -> tuple[int, ...]:
        """All: whether somebody else has one open, a worker knows."""
        _ = data
        return self.descriptors

    def takes_back(self, fd: int) -> bool:
        """A device has all of its clients on its channel."""
        _ = fd
        return False

    def leave(self) -> int | None:
        """See `Entrance`."""
        return self._mount

    def close(self) -> None:
        """The nodes go."""
        close_all(self.descriptors)
        self.descriptors = ()
        self._leave()


async def mount_on(opener: MakesDevices, folder: str, nursery: trio.Nursery) -> DeviceEntrance:
    """The files of a FUSE mount on *folder*; in *nursery* it is unmounted again.

    Raises:
        FrontendError: It cannot be had.
    """
    make_folder(os.path.dirname(folder), _FOLDER_MODE, umask=False)
    return mounted(opener, await opener.mount(folder), nursery)


def mounted(opener: MakesDevices, mount: Mounted, nursery: trio.Nursery) -> DeviceEntrance:
    """The files of a FUSE mount that is there; in *nursery* it is unmounted again."""
    fd, number = mount

    async def unmount() -> None:
        with trio.CancelScope(shield=True):  # the manager may be about to end
            await opener.unmount(number)
        found.gone.set()

    found = DeviceEntrance((fd,), partial(nursery.start_soon, unmount), number)
    return found


async def make_devices(
    opener: MakesDevices, name: str, owner: int, major: int, number: int
) -> tuple[DeviceEntrance, int]:
    """The two CUSE devices of TPM *name*, and their major number; *major* is tried first.

    Raises:
        FrontendError: One of them cannot be had.
    """
    channels: list[int] = []
    try:
        for place, device in enumerate(_devices(name)):
            made = await opener.make(Wanted(device, owner, major, 2 * number + place))
            channels.append(made.fd)
            major = made.major
    except BaseException:
        close_all(tuple(channels))
        raise
    return DeviceEntrance(tuple(channels)), major
