"""The kernel's end of a channel of CUSE, where another process or task is at ours."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import trio

from tests.support import kernel as fake
from tests.support.kernel import FakeKernel

if TYPE_CHECKING:
    import socket


class Client:
    """The kernel's end of a channel that is a socketpair, and one client there."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._end = trio.socket.from_stdlib_socket(end)
        self._unique = 0

    async def send(self, opcode: int, body: bytes) -> int:
        self._unique += 2
        await self._end.send(FakeKernel.message(opcode, self._unique, body))
        return self._unique

    async def receive(self) -> tuple[int, int, bytes]:
        """unique, errno, body."""
        message = await self._end.recv(1 << 17)
        length, error, unique = struct.unpack_from("=IiQ", message)
        assert length == len(message)
        return unique, -error, message[16:]

    async def call(self, opcode: int, body: bytes) -> tuple[int, bytes]:
        unique = await self.send(opcode, body)
        answered, error, reply = await self.receive()
        assert answered == unique
        return error, reply

    async def open(self) -> None:
        error, reply = await self.call(fake.OPEN, bytes(8))
        assert error == 0
        (self.handle,) = struct.unpack_from("=Q", reply)

    async def release(self) -> None:
        assert (await self.call(fake.RELEASE, self._handle + bytes(16)))[0] == 0

    async def write(self, data: bytes) -> int:
        return (await self.call(fake.WRITE, self._transfer(len(data)) + data))[0]

    async def read(self, size: int = 4096) -> bytes:
        return (await self.call(fake.READ, self._transfer(size)))[1]

    async def start_read(self, size: int = 4096) -> int:
        return await self.send(fake.READ, self._transfer(size))

    async def start_ioctl(self, number: int, argument: bytes = b"") -> int:
        in_size, out_size = fake.ioctl_sizes(number)
        body = struct.pack("=QIIQII", self.handle, 0, number, 0, in_size, out_size)
        return await self.send(fake.IOCTL, body + argument.ljust(in_size, b"\0"))

    async def ioctl(self, number: int, argument: bytes = b"") -> int:
        """The result in the structure."""
        unique = await self.start_ioctl(number, argument)
        answered, error, reply = await self.receive()
        assert (answered, error) == (unique, 0)
        return int(struct.unpack_from("=I", reply, 16)[0])

    async def interrupt(self, unique: int) -> None:
        await self._end.send(
            FakeKernel.message(fake.INTERRUPT, unique + 1, struct.pack("=Q", unique))
        )

    @property
    def _handle(self) -> bytes:
        return struct.pack("=Q", self.handle)

    def _transfer(self, size: int) -> bytes:
        return struct.pack("=QQIIQII", self.handle, 0, size, 0, 0, 2, 0)
