"""Hostile load on one TPM for as long as wanted: does it keep its descriptors and its memory?"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from tests.support import sockets as s
from tests.support.commands import get_random, pcr_extend, pcr_read

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

COMMANDS: Final = (get_random(32), get_random(8), pcr_read(16), pcr_extend(16, bytes(32)))
SEGMENTS: Final = 10
FAULT_SHARE: Final = 0.1


class Target(Protocol):
    """A running TPM: connections to it, and its process."""

    pid: int
    commands: int
    reconnects: int
    faults: dict[str, Callable[[random.Random], None]]

    def burst(self, commands: list[bytes]) -> None:
        """One connection with these commands, each answered before the next."""


class SocketTarget:
    """A server on sockets."""

    def __init__(self, server: s.Server) -> None:
        self._server = server
        self.pid = server.process.pid
        self.commands = self.reconnects = 0
        self.faults: dict[str, Callable[[random.Random], None]] = {
            "garbage": self._garbage,
            "half": self._half,
            "unread": self._unread,
            "control": self._control,
            "control garbage": self._control_garbage,
            "reset": self._reset,
        }

    def burst(self, commands: list[bytes]) -> None:
        """See Target."""
        with self._server.data() as client:
            sock = client.socket
            for command in commands:
                sock.sendall(command)
                assert sock.recv(4096)[:1] == b"\x80"
        self.commands += len(commands)
        self.reconnects += 1

    def _garbage(self, chance: random.Random) -> None:
        with self._server.data() as client:
            client.send(b"\x80\x01\0\0\0\x0c" + chance.randbytes(6))
            assert client.socket.recv(4096)
        self.reconnects += 1

    def _half(self, chance: random.Random) -> None:
        with self._server.data() as client:
            client.send(COMMANDS[0][: chance.randrange(1, 11)])
        self.reconnects += 1

    def _unread(self, chance: random.Random) -> None:
        with self._server.data() as client:
            client.send(chance.choice(COMMANDS))
        self.reconnects += 1

    def _control(self, chance: random.Random) -> None:
        with self._server.control() as client:
            assert client.control(s.GET_CONFIG, size=8) == s.u32(0, 0)
            assert client.control(s.SET_LOCALITY, bytes([chance.randrange(5)])) == s.u32(0)
            assert client.control(s.STORE_VOLATILE) == s.u32(0)
            assert client.control(0x7FFF) == s.u32(0xA)

    def _control_garbage(self, chance: random.Random) -> None:
        number = chance.choice((s.SET_LOCALITY, s.GET_STATEBLOB, s.HASH_DATA, 99))
        with self._server.control() as client:
            client.send(s.u32(number) + chance.randbytes(chance.randrange(30)))

    def _reset(self, _: random.Random) -> None:
        assert self._server.init() == 0
        self.burst([b"\x80\x01\0\0\0\x0c\0\0\x01\x44\0\0"])


class DeviceTarget:
    """A character device."""

    def __init__(self, path: str, pid: int) -> None:
        self._path = path
        self.pid = pid
        self.commands = self.reconnects = 0
        self.faults: dict[str, Callable[[random.Random], None]] = {
            "garbage": self._garbage,
            "unread": self._unread,
        }

    def burst(self, commands: list[bytes]) -> None:
        """See Target."""
        device = os.open(self._path, os.O_RDWR)
        try:
            for command in commands:
                os.write(device, command)
                assert os.read(device, 4096)[:1] == b"\x80"
        finally:
            os.close(device)
        self.commands += len(commands)
        self.reconnects += 1

    def _garbage(self, chance: random.Random) -> None:
        self.burst([b"\x80\x01\0\0\0\x0c" + chance.randbytes(2) + b"\xff\xff\xff\xff"])

    def _unread(self, chance: random.Random) -> None:
        device = os.open(self._path, os.O_RDWR)
        os.write(device, chance.choice(COMMANDS))
        os.close(device)
        self.reconnects += 1


def held(pid: int) -> tuple[int, int]:
    """Descriptors and resident KiB of a process."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    resident = int(status.partition("VmRSS:")[2].split()[0])
    return len(os.listdir(f"/proc/{pid}/fd")), resident


def soak(target: Target, commands: int, reconnects: int, seed: int) -> Iterator[dict[str, float]]:
    """Commands with a fault between some bursts; gives what is held after each tenth."""
    chance = random.Random(seed)  # noqa: S311  a load that can be had again
    size = max(1, commands // reconnects)
    given = 0
    begin = time.perf_counter()
    while given < SEGMENTS:
        target.burst(chance.choices(COMMANDS, k=chance.randrange(1, 2 * size)))
        if chance.random() < FAULT_SHARE:
            target.faults[chance.choice(sorted(target.faults))](chance)
        share = min(target.commands / commands, target.reconnects / reconnects)
        if share * SEGMENTS >= given + 1:
            given += 1
            descriptors, resident = held(target.pid)
            yield {
                "commands": target.commands,
                "reconnects": target.reconnects,
                "seconds": round(time.perf_counter() - begin, 1),
                "descriptors": descriptors,
                "resident_kib": resident,
            }
