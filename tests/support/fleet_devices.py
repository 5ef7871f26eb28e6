"""TPMs of a manager that are devices, and the kernel's end of them here."""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING, Final

import trio

from tests.support.channel import Client
from tests.support.fleet import started
from vtpm_cuse.errors import FrontendError
from vtpm_cuse.fleet.opener import Made

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vtpm_cuse.fleet.base import Interface
    from vtpm_cuse.fleet.manager.manager import Manager
    from vtpm_cuse.fleet.opener import Wanted

MAJOR: Final = 245
FIRST_NUMBER: Final = 7


class FakeOpener:
    """Makes channels whose other ends are here (implements `MakesDevices`).

    Attributes:
        wanted: What it was asked for.
        refused: Names of devices that it does not make.
        ends: The kernel's ends, by the devices' names.
        given: Numbers of the kernel's TPMs, and whose they are.
    """

    def __init__(self) -> None:
        self.makes: frozenset[Interface] = frozenset({"cuse", "vtpm-proxy"})
        self.wanted: list[Wanted] = []
        self.refused: set[str] = set()
        self.ends: dict[str, socket.socket] = {}
        self.given: list[tuple[int, int]] = []

    async def make(self, wanted: Wanted) -> Made:
        await trio.lowlevel.checkpoint()
        self.wanted.append(wanted)
        if wanted.name in self.refused:
            raise FrontendError("The kernel refused")
        return Made(self._channel(wanted.name), wanted.major or MAJOR)

    def _channel(self, name: str) -> int:
        end, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        if name in self.ends:
            self.ends[name].close()
        self.ends[name] = end
        return ours.detach()

    async def make_proxy(self) -> Made:
        await trio.lowlevel.checkpoint()
        number = FIRST_NUMBER + sum(name.startswith("tpm") for name in self.ends)
        return Made(self._channel(f"tpm{number}"), number)

    async def give_proxy(self, number: int, owner: int) -> None:
        await trio.lowlevel.checkpoint()
        self.given.append((number, owner))

    async def mount(self, folder: str) -> int:
        raise NotImplementedError

    async def unmount(self, folder: str) -> None:
        raise NotImplementedError

    async def opened(self, name: str) -> Client:
        """A client that has just opened this device."""
        client = Client(self.ends[name])
        await client.open()
        return client

    def gone(self, name: str) -> bool:
        """Whether nobody holds our end of its channel any more."""
        try:
            while self.ends[name].recv(1 << 17, socket.MSG_DONTWAIT):
                pass
        except BlockingIOError:
            return False
        return True


@contextlib.contextmanager
def fake_opener() -> Iterator[FakeOpener]:
    """Its ends are closed behind it."""
    found = FakeOpener()
    try:
        yield found
    finally:
        for end in found.ends.values():
            end.close()


async def started_device(
    manager: Manager, name: str, blobs: dict[str, bytes] | None = None
) -> None:
    """A TPM that is on, and is a device."""
    await started(manager, name, blobs, interface="cuse")


async def answer_of(client: Client, command: bytes) -> bytes:
    """The response to a command, read whole."""
    assert await client.write(command) == 0
    return await client.read()
