"""A tiny process that makes devices or mounts for its manager, and nothing else; forked before it all.

It answers its manager alone, over a socketpair, and ends with that. It also answers the kernel's
first request on a device, which says what its ioctls may do with the memory of clients: so no
worker, whom a client may have taken over, ever has that in its hand. Root's keeps the rights to make
TPM devices of the kernel's, and to give devices to their owners; a user's has FUSE file systems
mounted by fusermount3, and ends them.

It is one of two. The other one has the same rights, reads nothing, and makes it anew when it has
died: its manager has none of these rights by then. What the dead one has not answered is answered
by its successor, for a request stays in the socket until it is.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import resource
import secrets
import select
import socket
import stat
import time
from typing import TYPE_CHECKING, Final, NamedTuple, NoReturn, Protocol

import trio

from vtpm_cuse.acquire.chardev import make_proxy
from vtpm_cuse.acquire.cuse import CuseChannel, open_cuse
from vtpm_cuse.acquire.keeper import settle_down
from vtpm_cuse.acquire.mount import FuseMount, end_mount, mounts_below
from vtpm_cuse.errors import ChannelError, FrontendError, VtpmError
from vtpm_cuse.faults import sentence
from vtpm_cuse.fleet.blocking import close_all
from vtpm_cuse.fleet.channel import Channel
from vtpm_cuse.fleet.heritage import SavedOpener
from vtpm_cuse.fleet.messages import Inbox, Message, Order, Report
from vtpm_cuse.service.confine import capabilities, landlock, secrecy

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from typing import Self

    from vtpm_cuse.fleet.base import Interface

_NAME: Final = re.compile(r"vtpmd(rm)?-[A-Za-z0-9._-]{1,64}")
"""No other device is made: none that a rule or a program takes for something else."""
_CLASS: Final = "/sys/class/cuse"
_LEAVING_SECONDS: Final = 2.0
_TRY_AGAIN_SECONDS: Final = 0.02
_NODE_MODE: Final = 0o600
_REQUEST_MAX: Final = 1 << 14
"""Bytes; a path has up to 4096."""
_TURN_BITS: Final = 63
"""What a killed manager has asked is answered to the next one, who cannot take it for his."""
_MANY: Final = 65536
"""TPMs of the kernel's; from there on are the minor numbers of those for many clients."""


class Wanted(NamedTuple):
    """A CUSE device: /dev/``name``, which belongs to user ``owner``; major 0 is any."""

    name: str
    owner: int
    major: int
    minor: int


class Made(NamedTuple):
    """A device's channel to the kernel, which is the caller's.

    Its major number if it is CUSE's; of a TPM of the kernel's, the number in its name.
    """

    fd: int
    number: int


class MakesDevices(Protocol):
    """What a manager asks. All raise FrontendError.

    Attributes:
        makes: Which kinds of them.
    """

    makes: frozenset[Interface]

    async def make(self, wanted: Wanted) -> Made:
        """A CUSE device, which is there as long as its channel."""

    async def make_proxy(self) -> Made:
        """A TPM 2.0 of the kernel's, which is there as long as its channel, once that is answered."""

    async def give_proxy(self, number: int, owner: int) -> None:
        """Its nodes, which are there, become *owner*'s alone."""

    async def mount(self, folder: str) -> int:
        """A FUSE file system on *folder*, which is made if it is missing: its channel, the caller's."""

    async def unmount(self, folder: str) -> None:
        """Ends it; the folder goes, too."""


class Opener:
    """The manager's end (implements `MakesDevices`).

    Forks: no thread and no loop may be there yet.

    Args:
        mounts: A folder of the manager's alone; a user's mounts are below.
        own: It is a user's own: it mounts.
        left: That of an earlier manager, instead of a new one, if it is still there.

    Raises:
        OSError: There is no process to be had.
    """

    def __init__(self, mounts: str, *, own: bool, left: SavedOpener | None = None) -> None:
        self.makes: frozenset[Interface] = frozenset({"fuse"} if own else {"cuse", "vtpm-proxy"})
        self._turn = trio.Lock()
        self._turns = itertools.count(secrets.randbits(_TURN_BITS))
        self._above, self._outlives = mounts, False
        if left is not None:
            self._child, self._ours = left.pid, socket.socket(fileno=left.fd)
            self._channel = Channel(self._ours)
            return
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        manager = os.getpid()
        try:
            child = os.fork()
        except OSError:
            self._ours.close()
            theirs.close()
            raise
        if child == 0:
            _open_for(theirs, manager, mounts, own=own)
        theirs.close()
        self._child = child
        self._channel = Channel(self._ours)

    def __enter__(self) -> Self:
        return self

    def leave(self) -> SavedOpener:
        """It goes on, for the next manager. Nobody may be asking it."""
        return SavedOpener(self._child, self._ours.detach())

    def shared(self) -> SavedOpener:
        """From now on it may outlive this manager, for as long as somebody keeps what is returned."""
        self._outlives = True
        return SavedOpener(self._child, self._ours.fileno())

    @classmethod
    def behind(cls, left: SavedOpener, fresh: Self) -> Self:
        """That of a killed manager, which may have died, too; else a *fresh* one. The other one ends."""
        ended = select.poll()
        ended.register(left.fd, 0)
        if ended.poll(0):
            os.close(left.fd)
            return fresh
        with fresh:
            return cls(fresh._above, own=True, left=left)

    def __exit__(self, *_: object) -> None:
        """It ends, and is waited for, unless it was left."""
        if self._ours.fileno() < 0:
            return
        self._ours.close()
        if self._outlives:
            return
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._child, 0)

    async def make(self, wanted: Wanted) -> Made:
        """See `MakesDevices`."""
        answer = await self._asked(Order.OPEN, wanted)
        (fd,) = answer.descriptors
        return Made(fd, int(answer.body))

    async def make_proxy(self) -> Made:
        """See `MakesDevices`."""
        answer = await self._asked(Order.PROXY)
        (fd,) = answer.descriptors
        return Made(fd, int(answer.body))

    async def give_proxy(self, number: int, owner: int) -> None:
        """See `MakesDevices`."""
        await self._asked(Order.GIVE, (number, owner))

    async def mount(self, folder: str) -> int:
        """See `MakesDevices`."""
        (fd,) = (await self._asked(Order.MOUNT, (folder,))).descriptors
        return fd

    async def unmount(self, folder: str) -> None:
        """See `MakesDevices`."""
        await self._asked(Order.UNMOUNT, (folder,))

    async def end_others(self, used: Collection[str]) -> None:
        """Ends all of a user's mounts but those on folders of these names. Raises FrontendError."""
        await self._asked(Order.UNMOUNT)  # none; so all is done that a killed manager has asked
        kept = {os.path.join(self._above, name) for name in used}
        for folder in mounts_below(self._above).keys() - kept:
            await self.unmount(folder)

    async def _asked(self, order: Order, given: tuple[object, ...] = ()) -> Message:
        async with self._turn:
            answer: Message | None = None
            turn = next(self._turns)
            with trio.CancelScope(shield=True), contextlib.suppress(OSError):
                # else its answer would be the next one's
                await self._channel.send(Message(order, json.dumps(given).encode(), number=turn))
                answer = await self._answer_to(turn)
        if answer is None:
            raise FrontendError("The process that makes devices has ended", "restart vtpmd")
        if answer.kind is not Report.DONE:
            raise FrontendError(answer.body.decode())
        return answer

    async def _answer_to(self, turn: int) -> Message | None:
        """Who has died behind an answer has a successor, who gives it once more."""
        while (answer := await self._channel.receive()) is not None and answer.number != turn:
            close_all(answer.descriptors)
        return answer


def _open_for(end: socket.socket, manager: int, mounts: str, *, own: bool) -> NoReturn:
    try:
        settle_down("vtpm-opener: makes devices for vtpmd", {end.fileno()})
        if os.getppid() == manager:
            end.setblocking(True)
            if not own:
                _confine()
            secrecy.hide_process()
            _keep_one_there(end, mounts, own=own)
    finally:
        os._exit(0)


def _keep_one_there(end: socket.socket, mounts: str, *, own: bool) -> None:
    """Until the manager ends. What two have died of is refused."""
    deadly: bytes | None = None
    for turn in itertools.count():
        if (child := os.fork()) == 0:
            _work(end, mounts, own=own, heir=turn > 0)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
            return
        waiting = _first(end, socket.MSG_DONTWAIT)
        if waiting == b"":
            with _maker(mounts, own=own, heir=True):
                return
        if waiting is not None and waiting == deadly:
            with contextlib.suppress(OSError):  # the next one finds that out
                _answer(end, _request(waiting), _killed)
            waiting = None
        deadly = waiting


def _maker(mounts: str, *, own: bool, heir: bool) -> _Devices | _Mounts:
    return _Mounts(mounts if heir else None) if own else _Devices()


def _work(end: socket.socket, mounts: str, *, own: bool, heir: bool) -> NoReturn:
    status = 1
    try:
        with _maker(mounts, own=own, heir=heir) as maker:
            _serve(end, maker.answer)
        status = 0
    finally:
        os._exit(status)


def _serve(end: socket.socket, answer: Callable[[Message], Message]) -> None:
    """Makes what is asked for, until the manager ends."""
    with contextlib.suppress(OSError):  # it has ended, and does not wait for what it has asked
        while waiting := _first(end):
            _answer(end, _request(waiting), answer)


def _first(end: socket.socket, flags: int = 0) -> bytes | None:
    """The request that waits, which stays there; b"" at the end, None where there is none yet."""
    try:
        return end.recv(_REQUEST_MAX, flags | socket.MSG_PEEK)
    except BlockingIOError:
        return None
    except OSError:
        return b""


def _request(data: bytes) -> Message:
    """Raises ChannelError."""
    inbox = Inbox()
    inbox.feed(data, [])
    if (found := inbox.next()) is None:
        raise ChannelError("a request of an opener is not whole")
    return found


def _answer(end: socket.socket, request: Message, answer: Callable[[Message], Message]) -> None:
    """And only then is the request taken out of the socket. Raises OSError: nobody waits."""
    try:
        message = answer(request)
    except (VtpmError, OSError) as exc:
        message = Message(Report.FAILED, sentence(exc).encode())
    try:
        socket.send_fds(end, [message._replace(number=request.number).pack()], message.descriptors)
        end.recv(_REQUEST_MAX)
    finally:
        close_all(message.descriptors)


def _killed(_: Message) -> Message:
    raise FrontendError("The process that makes devices was killed twice while it made this one")


class _Devices:
    """Of CUSE, and TPMs of the kernel's."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """They are others'."""

    @staticmethod
    def answer(request: Message) -> Message:
        given = json.loads(request.body)
        match request.kind:
            case Order.OPEN:
                fd, number = _make_cuse(Wanted(*given))
            case Order.PROXY:
                fd, number = _make_proxy()
            case Order.GIVE:
                _give_proxy(*given)
                return Message(Report.DONE)
            case _:
                raise ChannelError("an opener of devices makes them")
        return Message(Report.DONE, str(number).encode(), descriptors=(fd,))


class _Mounts:
    """Of FUSE. It has the rights that its user has, for what mounts them takes more.

    Args:
        left: The folder of all that a dead one has left, whose successor this is. Nobody else's are
            ever ended: a manager that is refused, for there is one, has an opener, too.
    """

    def __init__(self, left: str | None = None) -> None:
        self._left: dict[str, str] = {}
        if left is not None:
            with contextlib.suppress(FrontendError):  # where they cannot be seen, none were made
                self._left = mounts_below(left)
        self._mounts: dict[str, FuseMount] = {}

    def __enter__(self) -> Self:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # one for each mount
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends all of them."""
        while self._mounts:
            self._mounts.popitem()[1].close()
        for folder, device in self._left.items():
            end_mount(folder, device)

    def answer(self, request: Message) -> Message:
        folders: list[str] = json.loads(request.body)
        if request.kind is Order.UNMOUNT:
            for folder in folders:
                self._end(folder)
            return Message(Report.DONE)
        if request.kind is not Order.MOUNT:
            raise ChannelError("an opener of file systems mounts")
        (folder,) = folders
        mount = FuseMount(folder)
        try:
            mount.take_folder(keeper=False)
            mount.mount()
            mount.answer_init_now()
        except BaseException:
            mount.close()
            raise
        self._mounts[folder] = mount
        return Message(Report.DONE, descriptors=(mount.give_away(),))

    def _end(self, folder: str) -> None:
        if (found := self._mounts.pop(folder, None)) is not None:
            found.close()
        else:
            end_mount(folder)


def _confine() -> None:
    """Root's has two rights left: to give a node to its owner, and to make TPMs; of paths, devices."""
    capabilities.keep_only(capabilities.CAP_CHOWN, capabilities.CAP_SYS_ADMIN)
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


def _make_proxy() -> Made:
    """Raises FrontendError."""
    made = make_proxy()
    return Made(made.fd, made.tpm_num)


def _give_proxy(number: int, owner: int) -> None:
    """Both nodes, which udev may have given to others. Raises FrontendError."""
    for name, minor in ((f"tpm{number}", None), (f"tpmrm{number}", _MANY + number)):
        _give(name, owner, minor)


def _give(name: str, owner: int, minor: int | None) -> int:
    """Makes the node its owner's, alone; returns the major number that it has.

    None else can use it from before on: to change its mode takes that it is root's.
    """
    node = f"/dev/{name}"
    try:
        found = os.lstat(node)
        if not stat.S_ISCHR(found.st_mode) or minor not in {None, os.minor(found.st_rdev)}:
            raise FrontendError(f"{node} is something else than the device that was made")
        if found.st_uid or stat.S_IMODE(found.st_mode) != _NODE_MODE:
            os.chown(node, 0, 0, follow_symlinks=False)
            os.chmod(node, _NODE_MODE)
        os.chown(node, owner, -1, follow_symlinks=False)
    except FileNotFoundError as exc:
        raise FrontendError(
            f"The kernel's device {node} is not there", "is /dev a devtmpfs?"
        ) from exc
    except OSError as exc:
        reason = f"Could not give {node} to user {owner}: {exc.strerror}"
        raise FrontendError(reason, "that takes root's manager") from exc
    return os.major(found.st_rdev)
