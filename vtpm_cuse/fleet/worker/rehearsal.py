"""A TPM that is nobody's, served for nobody: what a worker does is done before anybody waits for it.

A page of memory that a process shares with the one that it was forked from is copied when it is
first written to, and to use an object of Python is to write to it. That was nine tenths of a wake.
And in the zygote CPython rewrites code that often runs into a faster form, for all workers.

The zygote powers no TPM on: nothing random is drawn there, and nothing kept. A child of its makes
the TPM that each worker wakes and cuts off before it has one: who uses that is no client, and no
byte of it is ever given to one. What is rehearsed with is in no folder any more when there are
workers: nobody else connects to it.
"""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import sys
import tempfile
from types import FunctionType
from typing import TYPE_CHECKING, Final, NamedTuple

import trio

from vtpm_cuse.errors import ChannelError, StateMissing
from vtpm_cuse.fleet import lines
from vtpm_cuse.fleet.blocking import close_all
from vtpm_cuse.fleet.channel import Channel
from vtpm_cuse.fleet.messages import Answer, Call, Message, Order, Report, described
from vtpm_cuse.fleet.tasks import OFF, ON, RESUME, Task
from vtpm_cuse.fleet.worker.hearing import Hearing
from vtpm_cuse.fleet.worker.saved import LISTENERS

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import CodeType, FrameType

    from vtpm_cuse.fleet.worker.store import Managers

    Serve = Callable[[Hearing, Managers], Awaitable[None]]

_COMMAND: Final = bytes.fromhex("80010000000c0000017b0010")
"""TPM2_GetRandom."""
_COMMANDS: Final = 3
"""The first one takes another way than those that follow."""
_RESPONSE_MAX: Final = 4096
_IDLE_SECONDS: Final = 3600.0


class Practice(NamedTuple):
    """What `wake` needs.

    Attributes:
        task: A TPM that a worker has put to sleep; it is nobody's.
        listener: In place of all sockets where clients come.
    """

    task: Task
    listener: socket.socket


class Shelf:
    """In place of a manager: a TPM that is made stores here (implements `store.Managers`).

    Attributes:
        permanent: What it has stored last, as a LOAD would give it.
    """

    def __init__(self) -> None:
        self.permanent = b""

    def ask(self, message: Message) -> Message:
        """Does that, and says how it went."""
        match message.kind:
            case Call.STORE:
                self.permanent = message.body
            case Call.SIZES:
                return Message(Answer.DONE, b"{}")
            case Call.LOAD:
                lack = StateMissing("the state", "there is none")
                return Message(Answer.FAILED, described(lack))
        return Message(Answer.DONE)


def prepare(serve: Serve, rounds: int) -> Practice:
    """Has *serve* be a worker so many times, from power-up to sleep and from there to the end.

    Its TPM is off in this process; the one that `Practice` has was on, in a child of this one.

    Raises:
        ExceptionGroup: It does not do what a worker does; ChannelError is in it.
        ChannelError: The child has not done it.
        OSError: There is no folder for a socket, or no socket, to be had.
    """
    with tempfile.TemporaryDirectory(prefix="vtpmd-") as folder, contextlib.ExitStack() as undo:
        listener = undo.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(os.path.join(folder, "data"))
        listener.listen(1)

        def play() -> None:
            task = trio.run(_fall_asleep, serve, listener, OFF)
            trio.run(wake, serve, Practice(task, listener))

        gather(play)
        for _ in range(rounds):
            play()
        made = in_child(lambda: trio.run(_fall_asleep, serve, listener, ON).pack())
        undo.pop_all()
    return Practice(Task.unpack(made), listener)


def gather(play: Callable[[], None]) -> None:
    """Puts the code that *play* runs together in memory, where it has been all over it.

    Who calls a function writes to its code, which counts that: a page for each worker. trio knows
    by its code where an interrupt has to wait: none comes to a worker, which ignores SIGINT.
    """
    ran: dict[int, CodeType] = {}

    def note(frame: FrameType, event: str, _argument: object) -> None:
        if event == "call":
            ran[id(frame.f_code)] = frame.f_code

    sys.setprofile(note)
    try:
        play()
    finally:
        sys.setprofile(None)
    moved = {number: code.replace() for number, code in ran.items()}
    for one in gc.get_objects():
        if isinstance(one, FunctionType) and (code := moved.get(id(one.__code__))) is not None:
            one.__code__ = code


async def wake(serve: Serve, practice: Practice) -> None:
    """Has *serve* be a worker from a wake to a few answers, and the end. Raises ExceptionGroup."""
    ends = socket.socketpair()
    with trio.socket.from_stdlib_socket(ends[0]) as client, ends[1]:
        given = (*[practice.listener.fileno()] * LISTENERS, ends[1].fileno())
        await _played(serve, client, practice.task, RESUME, given, Shelf(), sleeps=False)


async def _fall_asleep(serve: Serve, listener: socket.socket, mode: int) -> Task:
    """The same from power-up to sleep; returns it as it sleeps."""
    shelf = Shelf()
    with trio.socket.socket(socket.AF_UNIX) as client:
        await client.connect(listener.getsockname())
        given = (listener.fileno(),) * LISTENERS
        said = await _played(serve, client, Task(_IDLE_SECONDS), mode, given, shelf, sleeps=True)
    close_all(said.descriptors)
    return Task(_IDLE_SECONDS, saved=said.body, permanent=shelf.permanent)


async def _played(
    serve: Serve,
    client: trio.socket.SocketType,
    task: Task,
    mode: int,
    given: tuple[int, ...],
    shelf: Shelf,
    *,
    sleeps: bool,
) -> Message:
    """The part of the manager and of a client; gives what the worker has said last."""
    line, end = lines.line()
    orders, calls = lines.bring(line, 2, lines.TELL)
    with (
        line,
        calls,
        contextlib.closing(Channel(orders)) as manager,
        contextlib.closing(Hearing(end)) as hearing,
    ):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, hearing, shelf)
            await manager.send(Message(Order.SERVE, task.pack(), mode, descriptors=given))
            said = await _heard(manager, Report.SERVING)
            for _ in range(_COMMANDS):
                await client.send(_COMMAND)
                await client.recv(_RESPONSE_MAX)
            if sleeps:
                await manager.send(Message(Order.SLEEP))
                said = await _heard(manager, Report.ASLEEP)
            manager.close()
            line.close()
    return said


async def _heard(manager: Channel, kind: Report) -> Message:
    said = await manager.receive()
    if said is None or said.kind is not kind:
        raise ChannelError(f"a worker has not said {kind.name}")
    return said


def in_child(job: Callable[[], bytes]) -> bytes:
    """What *job* returns in a child of this process. Raises ChannelError, OSError."""
    source, sink = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with open(sink, "wb") as file:
                file.write(job())
            os._exit(0)
        finally:  # whatever it was: this is the parent's code, and no place to go on
            os._exit(1)
    os.close(sink)
    with open(source, "rb") as file:
        found = file.read()
    if os.waitpid(child, 0)[1]:
        raise ChannelError("the process that makes a TPM to practise with has failed")
    return found
