"""What the resource manager costs, beside the same TPM's own socket.

.venv/bin/python bench/managed.py

One client in Python sends both ways the same commands, in turns. Then many clients use three keys
each, one command a time, where the TPM has room for three keys in all; so they do through
tpm2-abrmd, on a bus of its own, where that is installed.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from bench.report import Report, add_arguments, finish
from tests.support import manager_peers as peers
from tests.support.tabrmd import Connection, RefusedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

OURS: Final = str(Path(sys.executable).parent / "swtpm")
ROUNDS, COUNT = 20, 500
KEYS: Final = 3
CLIENTS: Final = (1, 8, 40)

_RETRY: Final = bytes.fromhex("80010000000a00000922")
_PASSWORD: Final = struct.pack(">IIHBH", 9, 0x40000009, 0, 0, 0)


def _command(code: int, body: bytes, tag: int = 0x8001) -> bytes:
    return struct.pack(">HII", tag, 10 + len(body), code) + body


class Way(Protocol):
    """A connection to a TPM."""

    def exchange(self, command: bytes) -> bytes:
        """One command, one response."""

    def close(self) -> None:
        """Ends it."""


class Socket:
    """To one of ours."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))

    def exchange(self, command: bytes) -> bytes:
        """One command, one response."""
        self._socket.sendall(command)
        return self._socket.recv(4096)

    def close(self) -> None:
        """Ends it."""
        self._socket.close()


class Client:
    """One connection, and the handles of its keys."""

    def __init__(self, way: Way) -> None:
        self._way = way
        self.close = way.close
        self.keys = [self._create(number) for number in range(KEYS)]

    def _create(self, number: int) -> int:
        unique = struct.pack(">HI", 4, number) + struct.pack(">H", 0)
        public = bytes.fromhex("0023 000b 00040072 0000 0010 0018 000b 0003 0010") + unique
        body = struct.pack(">I", 0x40000007) + _PASSWORD + bytes.fromhex("000400000000")
        body += struct.pack(">H", len(public)) + public + struct.pack(">HI", 0, 0)
        return int(struct.unpack_from(">I", self.ask(_command(0x131, body, 0x8002)), 10)[0])

    def ask(self, command: bytes) -> bytes:
        """A response, which is a success."""
        answer = _RETRY
        while answer[6:10] == _RETRY[6:]:
            answer = self._way.exchange(command)
        if answer[6:10] != bytes(4):
            sys.exit(f"bench: the TPM answered {answer[6:10].hex()}")
        return answer

    def times(self, command: bytes) -> list[float]:
        """Round trips in microseconds."""
        found = []
        for _ in range(COUNT):
            begun = time.perf_counter()
            self.ask(command)
            found.append((time.perf_counter() - begun) * 1e6)
        return found


def read_public(client: Client) -> bytes:
    """Of its first key."""
    return _command(0x173, struct.pack(">I", client.keys[0]))


def sign(client: Client) -> bytes:
    """By its first key: a digest, ECDSA, no ticket."""
    body = struct.pack(">I", client.keys[0]) + _PASSWORD + struct.pack(">H", 32) + bytes(range(32))
    body += bytes.fromhex("0018 000b 8024 40000007 0000")
    return _command(0x15D, body, 0x8002)


def get_random(_client: Client) -> bytes:
    """16 bytes."""
    return _command(0x17B, struct.pack(">H", 16))


LONE: Final[dict[str, Callable[[Client], bytes]]] = {
    "GetRandom": get_random,
    "ReadPublic": read_public,
    "Sign, ECDSA": sign,
}


def _lone(report: Report, raw_path: Path, managed_path: Path) -> None:
    for name, make in LONE.items():
        times: dict[Path, list[float]] = {raw_path: [], managed_path: []}
        for _ in range(ROUNDS):
            for path, found in times.items():
                client = Client(Socket(path))
                found += client.times(make(client))
                for key in client.keys:  # the other client needs the room
                    client.ask(_command(0x165, struct.pack(">I", key)))
                client.close()
        ours, raw = (statistics.median(times[path]) for path in (managed_path, raw_path))
        report.add(f"{name}, one client, p50", "µs", ours, raw, limit=1.1)


def _many(
    report: Report, managed: Callable[[], Way], others: Callable[[], Way] | None, pid: int
) -> None:
    for count in CLIENTS:
        theirs = None if others is None else round_robin(others, count)[0]
        before = _resident(pid)
        ours, after = round_robin(managed, count, lambda: _resident(pid))
        what = f"ReadPublic, {count} clients with {KEYS} keys each, p50"
        report.add(what, "µs", ours, theirs, limit=None if theirs is None else 0.1)
        if count == CLIENTS[-1]:
            report.add("memory of a client and its keys", "MiB", (after - before) / count / 1024)


def round_robin(
    connect: Callable[[], Way],
    count: int,
    measure: Callable[[], int] = int,
    commands: int = ROUNDS * COUNT // 4,
) -> tuple[float, int]:
    """The median of a ReadPublic in microseconds, and what *measure* says while all are there."""
    with ExitStack() as stack:
        clients = []
        for _ in range(count):
            clients.append(Client(connect()))
            stack.callback(clients[-1].close)
        turn_of_all = [
            (client, _command(0x173, struct.pack(">I", client.keys[turn])))
            for turn in range(KEYS)
            for client in clients
        ]
        found = []
        for _ in range(max(1, commands // len(turn_of_all))):
            for client, command in turn_of_all:
                begun = time.perf_counter()
                client.ask(command)
                found.append((time.perf_counter() - begun) * 1e6)
        return statistics.median(found), measure()


def _resident(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])


@contextmanager
def _served(folder: Path, *words: str) -> Iterator[int]:
    """A TPM that is in memory alone, with a data channel at "raw" in the folder; its process' id."""
    folder.mkdir()
    raw, ctrl = folder / "raw", folder / "ctrl"
    start = ["socket", "--tpm2", "--tpmstate", "backend-uri=mem://", "--flags", "startup-clear"]
    start += ["--server", f"type=unixio,path={raw}", "--log", "file=-"]
    start += ["--ctrl", f"type=unixio,path={ctrl}"]
    with subprocess.Popen([OURS, *start, *words]) as process:
        try:
            while not ctrl.exists():
                time.sleep(0.01)
                if process.poll() is not None:
                    sys.exit("bench: swtpm ended at once")
            yield process.pid
        finally:
            process.terminate()


@contextmanager
def _abrmd(folder: Path) -> Iterator[Callable[[], Way]]:
    """Connections to tpm2-abrmd, above a TPM of ours."""
    most = f"--max-connections={2 * CLIENTS[-1]}"
    with (
        _served(folder),
        peers.abrmd_daemon(folder / "bus", folder / "raw", most) as (_, env),
    ):
        os.environ.update(env)
        while True:
            with suppress(RefusedError):
                Connection().close()
                break
            time.sleep(0.01)
        yield Connection


def main() -> None:
    """Measures, and says what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    options = parser.parse_args()
    report = Report("managed", "The resource manager beside others, and a lone client beside none")
    report.notes.append(
        "Peer of one client alone: the data channel of the same program; of many: tpm2-abrmd."
    )
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        ours = Path(name) / "ours"
        managed = Path(name) / "managed"
        pid = stack.enter_context(_served(ours, "--managed", f"type=unixio,path={managed}"))
        others = None
        if peers.has_abrmd():
            others = stack.enter_context(_abrmd(Path(name) / "others"))
        os.sched_setaffinity(0, {0})
        _lone(report, ours / "raw", managed)
        _many(report, lambda: Socket(managed), others, pid)
    finish(report, options)


if __name__ == "__main__":
    main()
