"""Where the clients of a TPM come in while that is on: its sockets, or its devices."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import trio

from vtpm_cuse.acquire.peers import is_connection
from vtpm_cuse.acquire.sockets import acquire
from vtpm_cuse.config import SocketAddress, SocketConfig, VtpmConfig
from vtpm_cuse.errors import FrontendError
from vtpm_cuse.files import make_folder
from vtpm_cuse.fleet.blocking import close_all
from vtpm_cuse.fleet.opener import Made, Wanted
from vtpm_cuse.fleet.tasks import FUSE_FILES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from vtpm_cuse.fleet.base import Interface, SocketKind
    from vtpm_cuse.fleet.heritage import SavedMachine
    from vtpm_cuse.fleet.manager.surroundings import Surroundings
    from vtpm_cuse.fleet.opener import MakesDevices
    from vtpm_cuse.fleet.states.catalogue import Catalogue, Entry

SOCKETS: Final[dict[SocketKind, str]] = {
    "data": "data",
    "control": "data.ctrl",
    "managed": "managed",
}
"""Their names in a TPM's folder: as tpm2-tss has it, the control channel is beside the data's."""

_UDEV: Final = "/run/udev"
_SHOWN_SECONDS: Final = 10.0
"""The kernel's own test of a TPM takes it one or two on the slowest machine, and then comes udev."""
_LOOK_SECONDS: Final = 0.005
_SOCKET_MODE: Final = 0o600
_FOLDER_MODE: Final = 0o711
"""Others pass through it to what is theirs."""


class Places(NamedTuple):
    """The paths at which clients find a TPM; see `fleet.base.Tpm`."""

    sockets: Mapping[SocketKind, str]
    device: str | None = None
    managed_device: str | None = None


def places(interface: Interface, name: str, folder: str, number: int | None = None) -> Places:
    """Those of TPM *name*, whose folder for sockets is *folder*; the kernel calls it by *number*."""
    match interface:
        case "socket":
            return Places({kind: os.path.join(folder, file) for kind, file in SOCKETS.items()})
        case "fuse":
            return Places({}, *(os.path.join(folder, file) for file in FUSE_FILES))
        case "cuse":
            return Places({}, *(f"/dev/{device}" for device in _devices(name)))
        case "vtpm-proxy":
            return Places({}, *(() if number is None else _proxies(number)))


def _devices(name: str) -> tuple[str, str]:
    """No rule of udev for TPMs knows them, and no two TPMs have one of them."""
    return f"vtpmd-{name}", f"vtpmdrm-{name}"


def _proxies(number: int) -> tuple[str, str]:
    return f"/dev/tpm{number}", f"/dev/tpmrm{number}"


class Entrance(Protocol):
    """What is held open for clients, whoever serves them.

    Attributes:
        number: By which the kernel calls it, if it is a TPM of the kernel's.
        descriptors: What a worker is given first. They stay ours.
        gone: Set when clients find nothing any more, after `close`.
        owes: A dead worker's calls wait for answers that another one can give.
    """

    number: int | None
    owes: bool
    descriptors: tuple[int, ...]
    gone: trio.Event

    async def appear(self) -> None:
        """What clients find once the TPM answers is there. Raises FrontendError."""

    def watched(self, *, data: bool) -> tuple[int, ...]:
        """On which of them something may come for one that sleeps: with *data*, on all."""

    def takes_back(self, fd: int) -> bool:
        """Whether a worker may hand *fd* back with its TPM, as what it had besides."""

    def leave(self) -> None:
        """Its `descriptors` are somebody else's from now on."""

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

    number: int | None = None
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

    async def appear(self) -> None:
        """It is there already."""

    def watched(self, *, data: bool) -> tuple[int, ...]:
        """Without the first, whose next client waits for the one before."""
        return self.descriptors if data else self.descriptors[1:]

    def takes_back(self, fd: int) -> bool:
        """A connected socket of this host; nothing else is asked anything here, which may wait."""
        try:
            found = socket.socket(fileno=fd)
        except OSError:
            return False
        try:
            return is_connection(found)
        finally:
            found.detach()

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
    """

    owes = True

    def __init__(self, channels: tuple[int, ...], leave: Callable[[], None] | None = None) -> None:
        self.descriptors = channels
        self.number: int | None = None
        self.gone = trio.Event()
        self._leave = leave or self.gone.set

    async def appear(self) -> None:
        """It is there already."""

    def watched(self, *, data: bool) -> tuple[int, ...]:
        """All: whether somebody else has one open, a worker knows."""
        _ = data
        return self.descriptors

    def takes_back(self, fd: int) -> bool:
        """A device has all of its clients on its channel."""
        _ = fd
        return False

    def leave(self) -> None:
        """See `Entrance`."""

    def close(self) -> None:
        """The nodes go."""
        close_all(self.descriptors)
        self.descriptors = ()
        self._leave()


class ProxyEntrance(DeviceEntrance):
    """The channel of a TPM of the kernel's, which asks the TPM before it shows it.

    Args:
        made: The channel, and its number.
        opener: Who gives it to its *owner*.
    """

    def __init__(self, made: Made, opener: MakesDevices, owner: int) -> None:
        super().__init__((made.fd,))
        self.number = made.number
        self._opener, self._owner = opener, owner

    async def appear(self) -> None:
        """Waits for its nodes, and until udev, if there is one, has done with them."""
        assert self.number is not None  # noqa: S101  it is made with one
        with trio.move_on_after(_SHOWN_SECONDS):
            while not all(map(_is_shown, _proxies(self.number))):
                if self.gone.is_set():
                    raise FrontendError("The kernel has given the TPM's device up", "see dmesg")
                await trio.sleep(_LOOK_SECONDS)
            await self._opener.give_proxy(self.number, self._owner)
            return
        raise FrontendError("The kernel does not show the TPM's device", "see dmesg")


def _is_shown(path: str) -> bool:
    try:
        found = os.lstat(path)
    except OSError:
        return False
    numbers = f"{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}"
    known = os.path.exists(f"{_UDEV}/data/c{numbers}") or not os.path.exists(f"{_UDEV}/control")
    return known and stat.S_ISCHR(found.st_mode)


async def opened(name: str, entry: Entry, folder: str, shared: Surroundings) -> Entrance:
    """That of a TPM which is about to be on; the catalogue knows the major number of CUSE devices then.

    Raises:
        FrontendError: There is no such device to be had.
        VtpmError: Its sockets cannot be had.
        OSError: The same.
    """
    if entry.interface == "socket":
        return SocketEntrance(folder, entry.owner)
    opener = shared.need_opener(entry.interface)
    if entry.interface == "fuse":
        make_folder(os.path.dirname(folder), _FOLDER_MODE, umask=False)
        return _mounted(opener, await opener.mount(folder), folder, shared.nursery)
    if entry.interface == "vtpm-proxy":
        return ProxyEntrance(await opener.make_proxy(), opener, entry.owner)
    return await _made_devices(opener, name, entry, shared.catalogue)


def reopened(entry: Entry, folder: str, saved: SavedMachine, shared: Surroundings) -> Entrance:
    """That which an earlier manager has opened. Raises VtpmError, OSError."""
    if entry.interface == "socket":
        return SocketEntrance(folder, entry.owner, saved.entrance)
    if entry.interface == "cuse":
        return DeviceEntrance(saved.entrance)
    opener, (fd,) = shared.need_opener(entry.interface), saved.entrance
    if entry.interface == "fuse":
        return _mounted(opener, fd, folder, shared.nursery)
    return ProxyEntrance(Made(fd, saved.number or 0), opener, entry.owner)


def _mounted(opener: MakesDevices, fd: int, folder: str, nursery: trio.Nursery) -> DeviceEntrance:
    """The files of a FUSE mount that is there; in *nursery* it is unmounted again."""

    async def unmount() -> None:
        shielded = trio.CancelScope(shield=True)  # for the manager may be about to end
        with shielded, contextlib.suppress(FrontendError):  # who mounts has ended, and all mounts
            await opener.unmount(folder)
        found.gone.set()

    found = DeviceEntrance((fd,), partial(nursery.start_soon, unmount))
    return found


async def _made_devices(
    opener: MakesDevices, name: str, entry: Entry, catalogue: Catalogue
) -> DeviceEntrance:
    """The two CUSE devices of TPM *name*; the major number that it had is tried first.

    Raises:
        FrontendError: One of them cannot be had.
    """
    channels: list[int] = []
    major = entry.major or catalogue.major
    try:
        for place, device in enumerate(_devices(name)):
            made = await opener.make(Wanted(device, entry.owner, major, 2 * entry.number + place))
            channels.append(made.fd)
            major = made.number
    except BaseException:
        close_all(tuple(channels))
        raise
    catalogue.major = major
    return DeviceEntrance(tuple(channels))
