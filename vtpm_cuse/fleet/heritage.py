"""What a manager leaves to the one that takes its place: plain values, and open descriptors.

Over an execve those stay open and are named by their numbers; the values are lines of JSON in a
file in memory. To one that comes behind a killed one they are handed, with a text for each TPM.
What sleeps goes on sleeping, and who is awake keeps its process.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from typing import TYPE_CHECKING, Final, NamedTuple

from vtpm_cuse.errors import ChannelError
from vtpm_cuse.fleet import plain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from vtpm_cuse.fleet.base import State

log = logging.getLogger(__name__)

_VARIABLE: Final = "VTPMD_HERITAGE"
"""The number of that file's descriptor, in the environment of the next program."""
_PRIVATE: Final = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")
"""What a service manager has passed is among the descriptors, or closed."""


class SavedChannel(NamedTuple):
    """An end of a channel, and what of the next message has come on it."""

    fd: int
    data: bytes
    descriptors: tuple[int, ...]


class SavedWorker(NamedTuple):
    """A worker that goes on; ``held`` is the pidfd of its process, ``line`` where it is brought channels.

    ``channels`` are those that it has, for orders and for calls; None behind a killed manager.
    """

    pid: int
    held: int
    line: int
    channels: tuple[SavedChannel, SavedChannel] | None


class SavedVault(NamedTuple):
    """The state of one TPM: the descriptor with its lock, if it is locked; its key, if it has one."""

    lock: int | None
    key: bytes | None


class SavedMachine(NamedTuple):
    """A TPM that is on.

    ``entrance`` is where its clients come in, ``number`` that of a TPM of the kernel's;
    ``saved`` is what it sleeps with, which nobody has been given, or it is in the file ``blob``, which
    is empty once somebody has; ``worker`` has it while it is
    awake, and all of its connections. The rest is as in `fleet.manager.machine` and `fleet.base.Tpm`.
    """

    id: str
    state: State
    failure: str
    generation: int
    commands: int
    wakes: int
    used: float | None
    vault: SavedVault
    entrance: tuple[int, ...]
    number: int | None
    connections: tuple[int, ...]
    watch_data: bool
    blob: int | None
    worker: SavedWorker | None
    saved: bytes = b""


class SavedZygote(NamedTuple):
    """The process that workers are forked from, and its channel."""

    pid: int
    channel: SavedChannel


class SavedOpener(NamedTuple):
    """The process that makes devices, and its manager's end of their channel."""

    pid: int
    fd: int


class SavedManager(NamedTuple):
    """What is there once.

    ``form`` is that of all that workers have saved, ``lock`` has the lock of the catalogue,
    ``listener`` is where the manager is asked; at a path that is the manager's own, or somebody's
    who has opened it. ``depot`` is the line of who keeps what outlives a killed manager.
    """

    form: str
    lock: int
    listener: int
    own_path: bool
    zygote: SavedZygote | None
    opener: SavedOpener | None
    depot: int | None = None


class Heritage(NamedTuple):
    """All that is left by one manager, for one to take."""

    manager: SavedManager
    machines: tuple[SavedMachine, ...]

    def descriptors(self) -> Iterator[int]:
        """All that are open for it."""
        return _descriptors(self)


KINDS: Final = {
    kind.__name__: kind
    for kind in (
        *(SavedManager, SavedMachine, SavedVault, SavedWorker, SavedZygote, SavedChannel),
        SavedOpener,
    )
}


def _of_channel(channel: SavedChannel) -> tuple[int, ...]:
    return (channel.fd, *channel.descriptors)


def _descriptors(left: Heritage) -> Iterator[int]:
    manager = left.manager
    yield from (manager.lock, manager.listener)
    if manager.zygote is not None:
        yield from _of_channel(manager.zygote.channel)
    if manager.opener is not None:
        yield manager.opener.fd
    if manager.depot is not None:
        yield manager.depot
    for machine in left.machines:
        yield from descriptors_of(machine)


def descriptors_of(machine: SavedMachine) -> Iterator[int]:
    """All that are open for it."""
    yield from (fd for fd in (machine.vault.lock, machine.blob) if fd is not None)
    yield from (*machine.entrance, *machine.connections)
    if (worker := machine.worker) is not None:
        yield from (worker.held, worker.line)
        for channel in worker.channels or ():
            yield from _of_channel(channel)


def detached(one: SavedManager | SavedMachine) -> tuple[bytes, tuple[int, ...]]:
    """It as a text, and descriptors, for who is no child of this process."""
    found: list[int] = []

    def number(fd: int) -> int:
        found.append(fd)
        return len(found) - 1

    return plain.packed(_renumbered(one, number)), tuple(found)


def attached(text: bytes, descriptors: Sequence[int]) -> SavedManager | SavedMachine:
    """The reverse. Raises ChannelError: it is none that this version can take."""
    one = plain.unpacked(text, KINDS)
    try:
        found: SavedManager | SavedMachine = _renumbered(one, descriptors.__getitem__)
    except (LookupError, TypeError, AttributeError) as exc:
        raise ChannelError(
            f"what an earlier manager has left is of another version: {exc}"
        ) from exc
    return found


def _renumbered(
    one: SavedManager | SavedMachine, number: Callable[[int], int]
) -> SavedManager | SavedMachine:
    """With other numbers for all descriptors that a killed manager leaves."""
    if isinstance(one, SavedManager):
        opener = one.opener and one.opener._replace(fd=number(one.opener.fd))
        return one._replace(lock=number(one.lock), listener=number(one.listener), opener=opener)
    worker, vault = one.worker, one.vault
    if worker is not None:
        worker = worker._replace(held=number(worker.held), line=number(worker.line))
    return one._replace(
        vault=vault._replace(lock=None if vault.lock is None else number(vault.lock)),
        entrance=tuple(map(number, one.entrance)),
        connections=tuple(map(number, one.connections)),
        blob=None if one.blob is None else number(one.blob),
        worker=worker,
    )


def written(left: Heritage) -> int:
    """A file in memory with it. Raises OSError."""
    fd = os.memfd_create("heritage", os.MFD_CLOEXEC)
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, fd)
        with open(fd, "wb", closefd=False) as file:  # a line each: ten thousand are much at once
            file.writelines(plain.packed(one) + b"\n" for one in (left.manager, *left.machines))
        undo.pop_all()
    return fd


def read(fd: int) -> Heritage:
    """The reverse; the file is closed. Raises ChannelError: it is none that this version can take."""
    os.lseek(fd, 0, os.SEEK_SET)
    with open(fd, "rb") as file:
        manager, *machines = [plain.unpacked(line, KINDS) for line in file] or [None]
    if not isinstance(manager, SavedManager):
        raise ChannelError("what an earlier manager has left is no heritage")
    return Heritage(manager, tuple(machines))


def taken() -> Heritage | None:
    """What the program has left whose place this one has taken, if there was one. ChannelError."""
    number = os.environ.pop(_VARIABLE, "")
    if not number:
        return None
    try:
        left = read(int(number))
        for fd in left.descriptors():
            os.set_inheritable(fd, False)
    except (ValueError, OSError) as exc:
        raise ChannelError(f"what an earlier manager has left cannot be had: {exc}") from exc
    return left


def is_there() -> bool:
    """Whether this program has taken another one's place."""
    return _VARIABLE in os.environ


def bequeath(left: Heritage, more: Sequence[int]) -> None:
    """Has this program begin anew, as it is installed now, with all that is *left*, and *more*.

    Returns only where that is not to be. Raises OSError: then nothing has happened.
    """
    fd = written(left)
    words = [sys.executable, *sys.orig_argv[1:]]
    kept = [fd, *more, *left.descriptors()]
    environment = {name: text for name, text in os.environ.items() if name not in _PRIVATE}
    try:
        for one in kept:
            os.set_inheritable(one, True)
        os.execve(sys.executable, words, {**environment, _VARIABLE: str(fd)})  # noqa: S606
    finally:
        for one in kept:
            os.set_inheritable(one, False)
        os.close(fd)
