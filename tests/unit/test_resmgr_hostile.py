"""Clients that send anything, beside one that does not: in front of a TPM that is ours, or not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import pytest

from tests.device.managed_hostile import test_clients_that_send_anything_beside_one_that_does_not
from tests.support import managed as m
from vtpm_cuse.resmgr.manager import Manager
from vtpm_cuse.resmgr.shared import SharedManager

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vtpm_cuse.resmgr.manager import Connection

__all__ = ["test_clients_that_send_anything_beside_one_that_does_not"]


class Client:
    """A connection, without anything between."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._answer = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def send(self, data: bytes) -> None:
        self._answer = self._connection.process(data)

    def response(self) -> bytes:
        return self._answer

    def command(self, command: bytes) -> bytes:
        self.send(command)
        return self._answer


class World:
    """A TPM's clients, and nobody else."""

    def __init__(self, manager: Manager) -> None:
        self._manager = manager

    def client(self) -> Client:
        return Client(self._manager.connect())


@pytest.fixture(params=[Manager, SharedManager])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    with m.started_engine() as engine:
        yield World(request.param(engine))
