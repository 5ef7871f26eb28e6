"""What the resource manager costs, beside the same TPM's own socket.

.venv/bin/python bench/managed.py

One client in Python sends both ways the same commands, in turns. Then many clients use three keys
each, one command a time, where the TPM has room for three keys in all.
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
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Final

from bench.report import Report, add_arguments, finish

if TYPE_CHECKING:
    from collections.abc import Callable

OURS: Final = str(Path(sys.executable).parent / "swtpm")
ROUNDS, COUNT = 20, 500
KEYS: Final = 3
CLIENTS: Final = (1, 8, 40)

_RETRY: Final = bytes.fromhex("80010000000a00000922")
_PASSWORD: Final = struct.pack(">IIHBH", 9, 0x40000009, 0, 0, 0)


def _command(code: int, body: bytes, tag: int = 0x8001) -> bytes:
    return struct.pack(">HII", tag, 10 + len(body), code) + body


class Client:
    """One connection, and the handles of its keys."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(str(path))
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
            self.socket.sendall(command)
            answer = self.socket.recv(4096)
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
                client = Client(path)
                found += client.times(make(client))
                for key in client.keys:  # the other client needs the room
                    client.ask(_command(0x165, struct.pack(">I", key)))
                client.socket.close()
        ours, raw = (statistics.median(times[path]) for path in (managed_path, raw_path))
        report.add(f"{name}, one client, p50", "µs", ours, raw, limit=1.1)


def _many(report: Report, path: Path, pid: int) -> None:
    for count in CLIENTS:
        before = _resident(pid)
        with ExitStack() as stack:
            clients = [Client(path) for _ in range(count)]
            for client in clients:
                stack.callback(client.socket.close)
            commands = [
                (client, _command(0x173, struct.pack(">I", client.keys[turn])))
                for turn in range(KEYS)
                for client in clients
            ]
            found = []
            for _ in range(max(1, ROUNDS * COUNT // len(commands) // 4)):
                for client, command in commands:
                    begun = time.perf_counter()
                    client.ask(command)
                    found.append((time.perf_counter() - begun) * 1e6)
            what = f"ReadPublic, {count} clients with {KEYS} keys each, p50"
            report.add(what, "µs", statistics.median(found))
            if count == CLIENTS[-1]:
                grown = (_resident(pid) - before) / count
                report.add("memory of a client and its keys", "MiB", grown / 1024)


def _resident(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])


def main() -> None:
    """Measures, and says what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    options = parser.parse_args()
    report = Report("managed", "The resource manager beside the TPM's own socket")
    report.notes.append("Peer: the data channel of the same program, which has one client.")
    with tempfile.TemporaryDirectory() as name:
        raw, managed, ctrl = (Path(name) / part for part in ("raw", "managed", "ctrl"))
        words = ["socket", "--tpm2", "--tpmstate", "backend-uri=mem://", "--flags", "startup-clear"]
        words += ["--server", f"type=unixio,path={raw}", "--log", "file=-"]
        words += ["--managed", f"type=unixio,path={managed}", "--ctrl", f"type=unixio,path={ctrl}"]
        with subprocess.Popen([OURS, *words]) as process:
            try:
                while not managed.exists():
                    time.sleep(0.01)
                    if process.poll() is not None:
                        sys.exit("bench: swtpm ended at once")
                os.sched_setaffinity(0, {0})
                _lone(report, raw, managed)
                _many(report, managed, process.pid)
            finally:
                process.terminate()
    finish(report, options)


if __name__ == "__main__":
    main()
