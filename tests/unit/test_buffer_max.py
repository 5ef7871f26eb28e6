"""A TPM whose commands and responses are longer than 4096 bytes, wherever they come through."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import threading
from typing import TYPE_CHECKING, cast

import pytest

from tests.support.commands import get_random
from tests.support.engine import FakeEngine, echo
from tests.support.kernel import E2BIG, Machine
from tests.support.libtpms import BOTH, make
from tests.support.waiting import PATIENCE_SECONDS
from vtpm_cuse.client.commands import send_command
from vtpm_cuse.errors import DeviceError
from vtpm_cuse.proto.device import Opener
from vtpm_cuse.serve.connections import DataConnection
from vtpm_cuse.vtpm.managed import ManagedFile, ManagedOpen, ManagedVtpm
from vtpm_cuse.vtpm.turn import Turn
from vtpm_cuse.vtpm.vtpm import Vtpm
from vtpm_cuse.wire.tpm import SendCommandHeader

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vtpm_cuse.client.commands import TpmAddress

MORE = 8192


def long_command(size: int) -> bytes:
    return struct.pack(">HII", 0x8001, size, 0x17B) + bytes(size - 10)


@pytest.fixture
def machine() -> Machine:
    machine = Machine()
    machine.engine.buffer_max = machine.vtpm.buffer_max = MORE
    return machine


@BOTH
def test_todays_library_says_4096(tpm2: bool) -> None:
    assert make(tpm2=tpm2).buffer_max == 4096


def test_on_a_device(machine: Machine) -> None:
    kernel = machine.opened()
    assert kernel.write(long_command(MORE)).error == 0
    assert machine.engine.commands == [long_command(MORE)]
    assert kernel.read(2 * MORE).body == echo(long_command(MORE))
    assert kernel.write(long_command(MORE + 1)).error == E2BIG


def test_on_a_managed_device(machine: Machine) -> None:
    vtpm = machine.vtpm
    turn = Turn(machine.jobs.submit)
    managed = ManagedFile(vtpm, ManagedVtpm(vtpm), turn, lambda: None)
    found = managed.open(Opener(1000, 4711))
    assert error_of(found, MORE + 1) == errno.E2BIG
    assert error_of(found, MORE) == 0
    assert error_of(found, MORE) == errno.EBUSY  # the one before was taken


def error_of(found: ManagedOpen, size: int) -> int:
    try:
        found.write(long_command(size))
    except DeviceError as exc:
        return exc.errno
    return 0


@pytest.mark.parametrize("family", [socket.AF_UNIX, socket.AF_INET])
def test_on_a_socket(family: int) -> None:
    vtpm = Vtpm(FakeEngine(buffer_max=MORE), None)
    connection = socket.socket(family)
    with connection:
        data = DataConnection(connection, vtpm, known=True)
        assert data.read_size == MORE + SendCommandHeader.SIZE
        command = long_command(MORE)
        data.stream.feed(command[:5000])
        assert data.stream.next_request() is None
        data.stream.feed(command[5000:] + get_random(8))
        request = data.stream.next_request()
        assert request is not None
        assert request.command == command


class _Connected:
    def __init__(self, end: socket.socket) -> None:
        self._end = end

    @contextlib.contextmanager
    def opened(self) -> Iterator[int]:
        yield self._end.fileno()


def test_at_a_client() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        answer = threading.Thread(target=theirs.sendall, args=(long_command(MORE),))
        answer.start()
        address = cast("TpmAddress", _Connected(ours))
        assert send_command(address, get_random(8), seconds=PATIENCE_SECONDS) == long_command(MORE)
        answer.join()
        assert os.read(theirs.fileno(), 100) == get_random(8)
