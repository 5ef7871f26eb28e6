"""A manager of TPMs in this process, with its zygote and workers, and clients of its sockets."""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any, ClassVar, Final

import trio

from tests.support import commands as tpm
from tests.support.sockets import u32
from tests.support.waiting import PATIENCE_SECONDS, wait_until
from vtpm_cuse.fleet import lines
from vtpm_cuse.fleet.base import Spec
from vtpm_cuse.fleet.blocking import close_all
from vtpm_cuse.fleet.channel import Channel
from vtpm_cuse.fleet.manager.manager import Manager, Settings, managed
from vtpm_cuse.fleet.manager.workers import WorkerProcess
from vtpm_cuse.fleet.messages import Answer, Message
from vtpm_cuse.storage.stores import open_store

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from vtpm_cuse.fleet.base import Interface, SocketKind, State, Tpm
    from vtpm_cuse.fleet.manager.deposits import Deposits
    from vtpm_cuse.fleet.manager.pool import PlainPool, Pool
    from vtpm_cuse.fleet.opener import MakesDevices

LAZY: Final = 3600.0
"""Seconds: no TPM sleeps but when it is told to."""
UID: Final = os.geteuid()


@contextlib.asynccontextmanager
async def fleet(
    folder: Path,
    opener: MakesDevices | None = None,
    deposits: Deposits | None = None,
    **settings: Any,  # noqa: ANN401
) -> AsyncIterator[Manager]:
    """A manager whose TPMs sleep when they are told to."""
    found = Settings(str(folder / "state"), str(folder / "run"), **{"idle": LAZY, **settings})
    with trio.fail_after(PATIENCE_SECONDS):
        async with managed(found, opener, deposits=deposits) as manager:
            yield manager


def in_trio(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Runs the test in trio; the exception that it raised counts, not its group."""

    async def closing(*args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        try:
            await test(*args, **kwargs)
        finally:
            for client in Client.made:
                client.close()
            Client.made.clear()

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        try:
            trio.run(functools.partial(closing, *args, **kwargs))
        except BaseExceptionGroup as group:
            found: BaseException = group
            while isinstance(found, BaseExceptionGroup) and len(found.exceptions) == 1:
                found = found.exceptions[0]
            raise found from None

    return run


async def started(
    manager: Manager,
    name: str,
    blobs: dict[str, bytes] | None = None,
    *,
    interface: Interface = "socket",
) -> Tpm:
    """A TPM that is on; of these blobs, if any."""
    await manager.create(Spec(name, UID, interface=interface))
    if blobs is not None:
        store = open_store(f"dir://{manager._catalogue.state_of(name)}", tpm2=True)
        store.lock()
        store.replace_all(blobs)
        store.close()
    return await manager.start(name)


async def until(manager: Manager, name: str, state: State) -> None:
    """Waits for that state."""
    events = manager.watch()
    if (await manager.describe(name)).state != state:
        async for event in events:
            if (event.tpm.name, event.tpm.state) == (name, state):
                break


async def filled(pool: Pool | PlainPool, most: int) -> None:
    """Waits until so many manufactured TPMs wait."""
    await trio.to_thread.run_sync(wait_until, lambda: pool.waiting >= most, "a full pool")


def blobs_of_one() -> dict[str, bytes]:
    """The state of a TPM that has been on once, made in a process of its own."""
    code = (
        "import pickle, sys; from tests.support.suspension import prepared; "
        "sys.stdout.buffer.write(pickle.dumps(prepared()))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    found: dict[str, bytes] = pickle.loads(done.stdout)  # noqa: S301 - from our own child
    return found


class Client:
    """One connection to a socket of a TPM; `in_trio` closes all."""

    made: ClassVar[list[Client]] = []

    def __init__(self, connection: trio.socket.SocketType) -> None:
        self.connection = connection
        self.made.append(self)

    @classmethod
    async def of(cls, described: Tpm, kind: SocketKind = "data") -> Client:
        """Connects."""
        connection = trio.socket.socket(socket.AF_UNIX)
        await connection.connect(described.sockets[kind])
        return cls(connection)

    async def answer_of(self, size: int) -> bytes:
        """So many bytes. Raises ConnectionError at the end."""
        got = b""
        while len(got) < size:
            part = await self.connection.recv(size - len(got))
            if not part:
                raise ConnectionResetError(f"the end after {got.hex()}")
            got += part
        return got

    async def ask(self, command: bytes) -> bytes:
        """The response to a command."""
        await self.send(command)
        return await self.answer()

    async def send(self, command: bytes) -> None:
        """Without waiting for an answer."""
        assert await self.connection.send(command) == len(command)

    async def answer(self) -> bytes:
        """The next response. Raises ConnectionError at the end."""
        head = await self.answer_of(10)
        return head + await self.answer_of(int.from_bytes(head[2:6], "big") - 10)

    async def control(self, number: int, body: bytes, size: int) -> bytes:
        """The answer to a control request, of so many bytes."""
        await self.send(u32(number) + body)
        return await self.answer_of(size)

    async def until_end(self) -> None:
        """Waits for the end, whatever comes before."""
        with contextlib.suppress(ConnectionResetError):
            while await self.connection.recv(4096):
                pass

    async def at_end(self) -> bool:
        """Waits until something comes; whether that is the end."""
        try:
            return await self.connection.recv(1) == b""
        except ConnectionResetError:
            return True

    def close(self) -> None:
        """Hangs up."""
        self.connection.close()


class Puppet:
    """A worker whose words a test says: the other ends of its channels.

    The process is one that only waits, so that its end can be seen.

    Attributes:
        told: What came with its TPM.
    """

    def __init__(self) -> None:
        orders, self._orders = socket.socketpair()
        calls, self._calls = socket.socketpair()
        self.process = subprocess.Popen(["/bin/sleep", "1000"])
        held = os.pidfd_open(self.process.pid)
        line, self._line = lines.line()
        self.worker = WorkerProcess(self.process.pid, held, line, Channel(orders), Channel(calls))
        self.orders, self.calls = Channel(self._orders), Channel(self._calls)
        self.told = Message(Answer.FAILED)

    def send_raw(self, data: bytes, *, calls: bool = False) -> None:
        """Any bytes."""
        with contextlib.suppress(OSError):
            (self._calls if calls else self._orders).send(data)

    def end(self) -> None:
        """Waits until it has been ended."""
        self.process.kill()
        self.process.wait(PATIENCE_SECONDS)
        close_all(self.told.descriptors)
        self.orders.close()
        self.calls.close()
        self._line.close()


def random_of(response: bytes) -> bytes:
    """The bytes of a GetRandom."""
    assert tpm.code_of(response) == 0, response.hex()
    return response[12:]
