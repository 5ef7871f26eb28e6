"""A TPM that is off, served for nobody: what a worker does is done before anybody waits for it.

A page of memory that a process shares with the one that it was forked from is copied when it is
first written to, and to use an object of Python is to write to it. That was nine tenths of a wake.
And in the zygote CPython rewrites code that often runs into a faster form, for all workers.

libtpms is loaded, and powers no TPM on: nothing random is drawn, and nothing kept. What is
rehearsed with is in no folder any more when there are workers: nobody else connects to it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from typing import TYPE_CHECKING, Final, NamedTuple

import trio

from vtpm_cuse.errors import ChannelError
from vtpm_cuse.fleet.channel import BlockingChannel, Channel, close_all
from vtpm_cuse.fleet.messages import Message, Order, Report
from vtpm_cuse.fleet.tasks import OFF, RESUME, Task
from vtpm_cuse.fleet.worker.saved import LISTENERS

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Serve = Callable[[Channel, BlockingChannel], Awaitable[None]]

_COMMAND: Final = bytes.fromhex("80010000000c0000017b0010")
"""TPM2_GetRandom."""
_COMMANDS: Final = 3
"""The first one takes another way than those that follow."""
_RESPONSE_MAX: Final = 4096
_IDLE_SECONDS: Final = 3600.0


class Practice(NamedTuple):
    """What `wake` needs.

    Attributes:
        saved: What a worker has saved of a TPM that is off.
        listener: In place of all sockets where clients come.
    """

    saved: bytes
    listener: socket.socket


def prepare(serve: Serve, rounds: int) -> Practice:
    """Has *serve* be a worker so many times, from power-up to sleep and from there to the end.

    Raises:
        ExceptionGroup: It does not do what a worker does; ChannelError is in it.
        OSError: There is no folder for a socket, or no socket, to be had.
    """
    with tempfile.TemporaryDirectory(prefix="vtpmd-") as folder, contextlib.ExitStack() as undo:
        listener = undo.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(os.path.join(folder, "data"))
        listener.listen(1)
        practice = Practice(b"", listener)
        for _ in range(rounds):
            practice = Practice(trio.run(_fall_asleep, serve, listener), listener)
            trio.run(wake, serve, practice)
        undo.pop_all()
    return practice


async def wake(serve: Serve, practice: Practice) -> None:
    """Has *serve* be a worker from a wake to a few answers, and the end. Raises ExceptionGroup."""
    ends = socket.socketpair()
    with trio.socket.from_stdlib_socket(ends[0]) as client, ends[1]:
        task = Task(_IDLE_SECONDS, saved=practice.saved)
        given = (*[practice.listener.fileno()] * LISTENERS, ends[1].fileno())
        await _played(serve, client, task, RESUME, given, sleeps=False)


async def _fall_asleep(serve: Serve, listener: socket.socket) -> bytes:
    """The same from power-up to sleep; returns what it has saved."""
    with trio.socket.socket(socket.AF_UNIX) as client:
        await client.connect(listener.getsockname())
        given = (listener.fileno(),) * LISTENERS
        said = await _played(serve, client, Task(_IDLE_SECONDS), OFF, given, sleeps=True)
    close_all(said.descriptors)
    return said.body


async def _played(
    serve: Serve,
    client: trio.socket.SocketType,
    task: Task,
    mode: int,
    given: tuple[int, ...],
    *,
    sleeps: bool,
) -> Message:
    """The part of the manager and of a client; gives what the worker has said last."""
    ends, calls = socket.socketpair(), socket.socketpair()
    manager, orders = map(Channel, ends)
    with calls[0], calls[1], contextlib.closing(manager), contextlib.closing(orders):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, orders, BlockingChannel(calls[1]))
            await manager.send(Message(Order.SERVE, task.pack(), mode, descriptors=given))
            said = await _heard(manager, Report.SERVING)
            for _ in range(_COMMANDS):
                await client.send(_COMMAND)
                await client.recv(_RESPONSE_MAX)
            if sleeps:
                await manager.send(Message(Order.SLEEP))
                said = await _heard(manager, Report.ASLEEP)
            manager.close()
    return said


async def _heard(manager: Channel, kind: Report) -> Message:
    said = await manager.receive()
    if said is None or said.kind is not kind:
        raise ChannelError(f"a worker has not said {kind.name}")
    return said
