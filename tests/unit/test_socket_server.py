"""The server of data and control connections, where time matters: it is the test's."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, cast

import pytest
import trio
import trio.testing

from tests.support import sockets as s
from tests.support.engine import FakeEngine
from tests.support.sockets import u32
from tests.support.stores import FailingStore
from vtpm_cuse.acquire.endpoints import Endpoints
from vtpm_cuse.serve.sockets import SocketServer
from vtpm_cuse.storage.sealed import SealedStore
from vtpm_cuse.vtpm.ptm import PtmService
from vtpm_cuse.vtpm.vtpm import Vtpm

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from vtpm_cuse.serve.worker import Worker


def served(scenario: Callable[[socket.socket], Awaitable[None]]) -> None:
    """Runs *scenario* with the client's end of a control connection; waiting takes no time."""
    client, theirs = socket.socketpair()
    theirs.setblocking(False)
    client.setblocking(False)
    vtpm = Vtpm(FakeEngine(), SealedStore(FailingStore()))
    no_worker = cast("Worker", None)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            endpoints = Endpoints()
            endpoints.control_stream = theirs
            SocketServer(nursery, endpoints, PtmService(vtpm), no_worker).start()
            await scenario(client)
            nursery.cancel_scope.cancel()

    with client, theirs:
        trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def answer(client: socket.socket) -> bytes | None:
    """What has come; empty for the end, None for nothing."""
    try:
        return client.recv(100)
    except BlockingIOError:
        return None


@pytest.mark.parametrize(
    ("half", "seconds", "expected"),
    [
        (u32(s.SET_STATEBLOB, 0, 1, 4000), 0.5, b""),
        (u32(s.SET_STATEBLOB, 0, 1, 9000) + bytes(5000), 60, u32(3)),
        (u32(s.HASH_DATA, 9000) + bytes(5000), 60, u32(0xA)),
    ],
)
def test_half_a_request_is_not_kept_for_ever(half: bytes, seconds: float, expected: bytes) -> None:
    """A long one may take its time, but not all of it, and not more by trickling."""

    async def scenario(client: socket.socket) -> None:
        client.send(half)
        for _ in range(9):
            await trio.sleep(seconds / 10)
            client.send(b"x")
        await trio.sleep(seconds / 20)
        assert answer(client) is None
        await trio.sleep(seconds)
        assert answer(client) == expected

    served(scenario)


def test_silence_between_requests_may_last() -> None:
    """A VM monitor's lasts for the life of the VM."""

    async def scenario(client: socket.socket) -> None:
        for _ in range(3):
            await trio.sleep(80_000)
            client.send(u32(s.GET_CONFIG))
            await trio.sleep(1)
            assert answer(client) == bytes(8)

    served(scenario)
