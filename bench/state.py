"""What writing state costs, for each setting of durability, beside Debian's swtpm.

.venv/bin/python bench/state.py

Every server runs all the time; they take turns in short series, so that a change in the load of
machine and disk meets all. After each command there is a pause for what a server or the disk does
behind the answer; a hundred in a row show what that costs who does not pause. Where the C suite has
a setting of the same durability, it stands beside ours with a limit: what it keeps in a directory
it does not flush.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from bench.report import Report, add_arguments, finish

if TYPE_CHECKING:
    from collections.abc import Iterator

OURS: Final = str(Path(sys.executable).parent / "swtpm")
PEER: Final = "/usr/bin/swtpm"

OWNER, LOCKOUT, PLATFORM = 0x40000001, 0x4000000A, 0x4000000C
NV_INDEX: Final = 0x01500017
PERSISTENT: Final = 0x81000001
_PASSWORD: Final = bytes.fromhex("00000009400000090000000000")

SETTINGS: Final = {
    "directory, not flushed": ("dir={folder},fsync=false", "dir={folder}"),
    "directory, encrypted, not flushed": ("dir={folder},fsync=false", "dir={folder}"),
    "directory (default)": ("dir={folder}", None),
    "directory, backup, not flushed": ("dir={folder},fsync=false,backup", None),
    "directory, backup": ("dir={folder},backup", None),
    "linear file, not flushed": ("backend-uri=file://{folder}/state,fsync=false", None),
    "linear file (default)": (
        "backend-uri=file://{folder}/state",
        "backend-uri=file://{folder}/state",
    ),
}
"""Name to our ``--tpmstate`` and the C suite's, None where it has nothing of that durability."""

COMMANDS: Final = ("NV_Write", "DictionaryAttackParameters", "EvictControl", "Clear")
SERIES: Final = 20
PAUSE_SECONDS: Final = 0.003
ROW: Final = 100
ROWS: Final = 5
IN_A_ROW: Final = f"{COMMANDS[0]}, {ROW} in a row"
LIMIT: Final = 1.05
"""No slower, but for what one run differs from the next."""


def command(code: int, handles: tuple[int, ...], body: bytes) -> bytes:
    """A TPM 2 command with one empty password for the first handle."""
    data = struct.pack(f">{len(handles)}I", *handles) + _PASSWORD + body
    return struct.pack(">HII", 0x8002, 10 + len(data), code) + data


def sized(data: bytes) -> bytes:
    """With its length in two bytes."""
    return struct.pack(">H", len(data)) + data


@dataclass
class Server:
    """One program with one setting, and the microseconds of its commands."""

    process: subprocess.Popen[bytes]
    connection: socket.socket
    times: dict[str, list[float]] = field(default_factory=dict)
    key: int = 0
    turn: int = 0

    def run(self, message: bytes) -> bytes:
        """One command that must succeed."""
        self.connection.sendall(message)
        response = self.connection.recv(4096)
        if response[6:10] != bytes(4):
            sys.exit(f"bench: command {message.hex()} answered {response.hex()}")
        return response

    def prepare(self) -> None:
        """An index, and a key to make persistent."""
        public = struct.pack(">IHIHH", NV_INDEX, 0x000B, 0x00020002, 0, 64)
        self.run(command(0x12A, (OWNER,), sized(b"") + sized(public)))
        ecc = bytes.fromhex("0023000b00040072000000100018000b00030010" + "00000000")
        body = sized(bytes(4)) + sized(ecc) + sized(b"") + bytes(4)
        self.key = int.from_bytes(self.run(command(0x131, (OWNER,), body))[10:14], "big")

    def measure(self, name: str) -> None:
        """One command, once, and time for what the server or the disk does after it."""
        message = self.message(name)
        begun = time.perf_counter()
        self.run(message)
        self.times.setdefault(name, []).append((time.perf_counter() - begun) * 1e6)
        self.turn += 1
        time.sleep(PAUSE_SECONDS)

    def measure_row(self) -> None:
        """A whole series without a pause; the time of one."""
        begun = time.perf_counter()
        for _ in range(ROW):
            self.run(self.message(COMMANDS[0]))
            self.turn += 1
        each = (time.perf_counter() - begun) * 1e6 / ROW
        self.times.setdefault(IN_A_ROW, []).append(each)
        time.sleep(PAUSE_SECONDS * ROW)

    def message(self, name: str) -> bytes:
        """Each time another one, so that there is something to write."""
        if name == "NV_Write":
            data = struct.pack(">Q", self.turn) * 8
            return command(0x137, (OWNER, NV_INDEX), sized(data) + bytes(2))
        if name == "DictionaryAttackParameters":
            return command(0x13A, (LOCKOUT,), struct.pack(">III", 10 + self.turn % 20, 100, 100))
        if name == "EvictControl":  # in and out by turns
            handle = PERSISTENT if len(self.times.get(name, ())) % 2 else self.key
            return command(0x120, (OWNER, handle), struct.pack(">I", PERSISTENT))
        return command(0x126, (PLATFORM,), b"")


@contextlib.contextmanager
def running(program: str, state: str, *words: str) -> Iterator[Server]:
    """A server with a client."""
    ours, theirs = socket.socketpair()
    with ours, tempfile.TemporaryDirectory() as name:
        ours.settimeout(60)
        with theirs:
            process = subprocess.Popen(
                [
                    *(program, "socket", "--tpm2", "--flags", "startup-clear"),
                    *("--tpmstate", state.format(folder=name), "--log", "file=-"),
                    *("--fd", str(theirs.fileno()), *words),
                ],
                pass_fds=[theirs.fileno()],
            )
        server = Server(process, ours)
        try:
            server.prepare()
            yield server
        finally:
            process.terminate()
            process.wait()


Pair = tuple[Server, Server | None]


def measured(options: argparse.Namespace) -> dict[str, Pair]:
    """All servers, after all commands."""
    with contextlib.ExitStack() as stack, tempfile.NamedTemporaryFile("w") as key:
        key.write("5a" * 16)
        key.flush()
        pairs: dict[str, Pair] = {}
        for name, (ours, peer) in SETTINGS.items():
            words = ["--key", f"file={key.name}"] if "encrypted" in name else []
            theirs = peer and stack.enter_context(running(options.peer, peer, *words))
            pairs[name] = stack.enter_context(running(options.ours, ours, *words)), theirs or None
        for _ in range(ROWS):
            for server in [one for pair in pairs.values() for one in pair if one]:
                server.measure_row()
        for what in COMMANDS:
            for _ in range(0, options.count, SERIES):
                for server in [one for pair in pairs.values() for one in pair if one]:
                    for _ in range(SERIES):
                        server.measure(what)
        return pairs


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--peer", default=PEER, help="the C suite's program")
    parser.add_argument("--ours", default=OURS, help="this package's program")
    parser.add_argument("--count", type=int, default=300, help="times of each command (300)")
    add_arguments(parser)
    options = parser.parse_args()
    if not shutil.which(options.peer):
        sys.exit(f"bench: {options.peer} is missing; apt-get install swtpm")
    report = Report("state", "State writes, round trip p50 by durability")
    for setting, (ours, peer) in measured(options).items():
        for what in (*COMMANDS, IN_A_ROW):
            mine = statistics.median(ours.times[what])
            theirs = None if peer is None else statistics.median(peer.times[what])
            limit = LIMIT if theirs is not None and "linear" not in setting else None
            report.add(f"{what}, {setting}", "µs", mine, theirs, limit)
    report.notes.append(
        'The C suite\'s directory is never flushed, so only our rows "not flushed" stand beside it. '
        "Its linear file is flushed, but overwritten in place: a power cut can leave half a state. "
        "Ours takes a second flush to leave the old or the new one. Where the file system takes long "
        "to free a replaced file, ours frees it behind the answer; a hundred in a row have to wait "
        "for it in the end."
    )
    finish(report, options)


if __name__ == "__main__":
    main()
