"""A tiny process that makes devices or mounts for its manager, and nothing else; forked before it all.

It answers its manager alone, over a socketpair, and ends with that. It also answers the kernel's
first request on a device, which says what its ioctls may do with the memory of clients: so no
worker, whom a client may have taken over, ever has that in its hand. Root's keeps the right to make
CUSE devices; a user's has FUSE file systems mounted by fusermount3, and ends them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import socket
import stat
import time
from typing import TYPE_CHECKING, Final, NamedTuple, NoReturn, Protocol

import trio

from vtpm_cuse.acquire.cuse import CuseChannel, open_cuse
from vtpm_cuse.acquire.keeper import settle_down
from vtpm_cuse.acquire.mount import FuseMount
from vtpm_cuse.errors import ChannelError, FrontendError, VtpmError
from vtpm_cuse.faults import sentence
from vtpm_cuse.fleet.channel import BlockingChannel, Channel, close_all
from vtpm_cuse.fleet.heritage import SavedOpener
from vtpm_cuse.fleet.messages import Message, Order, Report
from vtpm_cuse.service.confine import capabilities, landlock, secrecy

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

    from vtpm_cuse.fleet.base import Interface

_NAME: Final = re.compile(r"vtpmd(rm)?-[A-Za-z0-9._-]{1,64}")
"""No other device is made: none that a rule or a program takes for something else."""
_CLASS: Final = "/sys/class/cuse"
_LEAVING_SECONDS: Final = 2.0
_TRY_AGAIN_SECONDS: Final = 0.02


class Wanted(NamedTuple):
    """A CUSE device: /dev/``name``, which belongs to user ``owner``; major 0 is any."""

    name: str
    owner: int
    major: int
    minor: int


class Made(NamedTuple):
    """Its channel to the kernel, which is the caller's, and its major number."""

    fd: int
    major: int


class Mounted(NamedTuple):
    """A file system's channel to the kernel, which is the caller's, and what `unmount` takes."""

    fd: int
    number: int


class MakesDevices(Protocol):
    """What a manager asks.

    Attributes:
        makes: Which kind of them.
    """

    makes: Interface

    async def make(self, wanted: Wanted) -> Made:
        """A device, which is there as long as its channel. Raises FrontendError."""

    async def mount(self, folder: str) -> Mounted:
        """A FUSE file system on *folder*, which is made if it is missing. Raises FrontendError."""

    async def unmount(self, number: int) -> None:
        """Ends one; its folder goes, too."""


class Opener:
    """The manager's end (implements `MakesDevices`).

    Forks: no thread and no loop may be there yet.

    Args:
        makes: "cuse", or "fuse".
        left: That of an earlier manager, instead of a new one.

    Raises:
        OSError: There is no process to be had.
    """

    def __init__(self, makes: Interface, left: SavedOpener | None = None) -> None:
        self.makes = makes
        self._turn = trio.Lock()
        if left is not None:
            self._child, self._ours = left.pid, socket.socket(fileno=left.fd)
            self._channel = Channel(self._ours)
            return
        self._ours, theirs = socket.socketpair()
        manager = os.getpid()
        try:
            child = os.fork()
        except OSError:
            self._ours.close()
            theirs.close()
            raise
        if child == 0:
            _open_for(theirs, manager, makes)
        theirs.close()
        self._child = child
        self._channel = Channel(self._ours)

    def __enter__(self) -> Self:
        return self

    def leave(self) -> SavedOpener:
        """It goes on, for the next manager. Nobody may be asking it."""
        return SavedOpener(self._child, self._ours.detach())

    def __exit__(self, *_: object) -> None:
        """It ends, and is waited for, unless it was left."""
        if self._ours.fileno() < 0:
            return
        self._ours.close()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._child, 0)

    async def make(self, wanted: Wanted) -> Made:
        """See `MakesDevices`."""
        answer = await self._asked(Message(Order.OPEN, json.dumps(wanted).encode()))
        (fd,) = answer.descriptors
        return Made(fd, answer.number)

    async def mount(self, folder: str) -> Mounted:
        """See `MakesDevices`."""
        answer = await self._asked(Message(Order.MOUNT, os.fsencode(folder)))
        (fd,) = answer.descriptors
        return Mounted(fd, answer.number)

    async def unmount(self, number: int) -> None:
        """See `MakesDevices`."""
        with contextlib.suppress(FrontendError):  # it has ended, and all mounts with it
            await self._asked(Message(Order.UNMOUNT, number=number))

    async def _asked(self, request: Message) -> Message:
        async with self._turn:
            answer: Message | None = None
            with trio.CancelScope(shield=True), contextlib.suppress(OSError):
                # else its answer would be the next one's
                await self._channel.send(request)
                answer = await self._channel.receive()
        if answer is None:
            raise FrontendError("The process that makes devices has ended", "restart vtpmd")
        if answer.kind is not Report.DONE:
            raise FrontendError(answer.body.decode())
        return answer


def _open_for(end: socket.socket, manager: int, makes: Interface) -> NoReturn:
    try:
        settle_down("vtpm-opener: makes devices for vtpmd", {end.fileno()})
        if os.getppid() == manager:
            with _Devices() if makes == "cuse" else _Mounts() as maker:
                _serve(BlockingChannel(end), maker.answer)
    finally:
        os._exit(0)


def _serve(channel: BlockingChannel, answer: Callable[[Message], Message]) -> None:
    """Makes what is asked for, until the manager ends."""
    with contextlib.suppress(OSError, ChannelError):
        while (request := channel.receive()) is not None:
            close_all(request.descriptors)
            try:
                message = answer(request)
            except (VtpmError, OSError) as exc:
                message = Message(Report.FAILED, sentence(exc).encode())
            channel.send(message)
            close_all(message.descriptors)


class _Devices:
    """Of CUSE."""

    def __enter__(self) -> Self:
        _confine()
        return self

    def __exit__(self, *_: object) -> None:
        """They are others'."""

    @staticmethod
    def answer(request: Message) -> Message:
        if request.kind is not Order.OPEN:
            raise ChannelError("an opener of devices opens")
        fd, major = _make_cuse(Wanted(*json.loads(request.body)))
        return Message(Report.DONE, number=major, descriptors=(fd,))


class _Mounts:
    """Of FUSE. It has the rights that its user has, for what mounts them takes more."""

    def __init__(self) -> None:
        self._mounts: dict[int, FuseMount] = {}
        self._last = 0

    def __enter__(self) -> Self:
        secrecy.hide_process()
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # one for each mount
        return self

    def __exit__(self, *_: object) -> None:
        while self._mounts:
            self._mounts.popitem()[1].close()

    def answer(self, request: Message) -> Message:
        if request.kind is Order.UNMOUNT:
            if (found := self._mounts.pop(request.number, None)) is not None:
                found.close()
            return Message(Report.DONE)
        if request.kind is not Order.MOUNT:
            raise ChannelError("an opener of file systems mounts")
        mount = FuseMount(os.fsdecode(request.body))
        try:
            mount.take_folder(keeper=False)
            mount.mount()
            mount.answer_init_now()
        except BaseException:
            mount.close()
            raise
        self._last += 1
        self._mounts[self._last] = mount
        return Message(Report.DONE, number=self._last, descriptors=(mount.give_away(),))


def _confine() -> None:
    """Root's has one right left, which is to give a node to its owner; of paths, devices."""
    secrecy.hide_process()
    capabilities.keep_only(capabilities.CAP_CHOWN)
    capabilities.gain_nothing()
    with contextlib.suppress(landlock.LandlockMissing):
        landlock.restrict({"/dev": landlock.READ_FILE | landlock.WRITE_FILE})


def _make_cuse(wanted: Wanted) -> Made:
    """Raises FrontendError."""
    name, owner, major, minor = wanted
    if not _NAME.fullmatch(name):
        raise FrontendError(f"A device of a TPM is not called {name}")
    _wait_for_name(name)
    channel = _registered(name, major, minor)
    try:
        return Made(channel.fd, _give(name, owner, minor))
    except FrontendError:
        channel.close()
        raise


def _wait_for_name(name: str) -> None:
    """A process that has just been killed may have it for a moment."""
    deadline = time.monotonic() + _LEAVING_SECONDS
    while os.path.exists(f"{_CLASS}/{name}") and time.monotonic() < deadline:
        time.sleep(_TRY_AGAIN_SECONDS)


def _registered(name: str, major: int, minor: int) -> CuseChannel:
    """The major number is this device's last one, or that of others: it may be somebody else's now."""
    channel = CuseChannel(open_cuse())
    try:
        channel.create_device(name, major, minor)
    except FrontendError as exc:
        channel.close()
        if not major or os.path.exists(f"{_CLASS}/{name}"):
            raise FrontendError(exc.reason, "another program may have made it") from exc
        return _registered(name, 0, minor)
    return channel


def _give(name: str, owner: int, minor: int) -> int:
    """Makes the node its owner's, alone; returns the major number that it has."""
    node = f"/dev/{name}"
    try:
        found = os.lstat(node)
        if not stat.S_ISCHR(found.st_mode) or os.minor(found.st_rdev) != minor:
            raise FrontendError(f"{node} is something else than the device that was made")
        os.chown(node, owner, -1, follow_symlinks=False)
    except FileNotFoundError as exc:
        raise FrontendError(
            f"The kernel's device {node} is not there", "is /dev a devtmpfs?"
        ) from exc
    except OSError as exc:
        reason = f"Could not give {node} to user {owner}: {exc.strerror}"
        raise FrontendError(reason, "that takes root's manager") from exc
    return os.major(found.st_rdev)
