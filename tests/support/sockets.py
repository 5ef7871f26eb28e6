"""A `swtpm socket` process and its clients, bytes written out as the documents have them."""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import select
import socket
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from tests.support import zygote
from tests.support.waiting import PATIENCE_SECONDS, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.support.zygote import Forked

TREE: Final = Path(__file__).parents[2]
OURS: Final = (
    sys.executable,
    "-c",
    "import sys; from vtpm_cuse.cli.swtpm import main; sys.exit(main())",
)

_INSTALLED: Final = str(zygote.PROGRAMS / "swtpm")

GET_CAPABILITY, INIT, SHUTDOWN, GET_TPMESTABLISHED, SET_LOCALITY = 1, 2, 3, 4, 5
HASH_START, HASH_DATA, HASH_END, CANCEL_TPM_CMD, STORE_VOLATILE = 6, 7, 8, 9, 10
RESET_TPMESTABLISHED, GET_STATEBLOB, SET_STATEBLOB, STOP, GET_CONFIG = 11, 12, 13, 14, 15
SET_DATAFD, SET_BUFFERSIZE, GET_INFO, LOCK_STORAGE = 16, 17, 18, 19

PERMANENT, VOLATILE, SAVESTATE = 1, 2, 3
RUNNING: Final = ("--flags", "not-need-init,startup-clear")
NOT_NEED_INIT: Final = ("--flags", "not-need-init")


def u32(*values: int) -> bytes:
    return struct.pack(f">{len(values)}I", *values)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(TREE)}


def run_swtpm(
    *words: str | Path,
    program: Sequence[str] = OURS,
    pass_fds: Sequence[int] = (),
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """One call that is expected to end by itself."""
    arguments = ["socket", *map(str, words)]
    if zygote.warm and program == OURS and not pass_fds:
        done = zygote.warm[-1].run([_INSTALLED, *arguments], env=env, cwd=cwd)
        said = [text.decode() for text in done[1:]]
        return subprocess.CompletedProcess([_INSTALLED, *arguments], done[0], *said)
    return subprocess.run(
        [*program, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
        pass_fds=pass_fds,
        env={**environment(), **(env or {})},
        cwd=cwd,
    )


class Client:
    """One connection; receiving never waits for ever."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        connection.settimeout(PATIENCE_SECONDS)
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def close(self) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self.socket.recv(size - len(data))
            assert part, f"end of stream after {data.hex()}"
            data += part
        return data

    def ended(self) -> bool:
        """Waits for the next byte or the end; True for the end."""
        try:
            return self.socket.recv(1) == b""
        except ConnectionResetError:
            return True

    def rest(self) -> bytes:
        """All until the end."""
        data = b""
        with contextlib.suppress(ConnectionResetError):
            while part := self.socket.recv(65536):
                data += part
        return data

    # -- the data channel -------------------------------------------------------------------

    def response(self) -> bytes:
        """One TPM response."""
        head = self.exactly(10)
        return head + self.exactly(int.from_bytes(head[2:6], "big") - 10)

    def command(self, command: bytes) -> bytes:
        self.send(command)
        return self.response()

    # -- the control channel ----------------------------------------------------------------

    def control(self, number: int, body: bytes = b"", size: int = 4) -> bytes:
        """One request; the response is *size* bytes, or just the result where it is not 0."""
        self.send(u32(number) + body)
        return self.answer(size)

    def answer(self, size: int = 4) -> bytes:
        data = self.exactly(4)
        return data if data != bytes(4) else data + self.exactly(size - 4)

    def result(self, number: int, body: bytes = b"") -> int:
        """The result of a request whose answer is nothing but that."""
        return int.from_bytes(self.control(number, body), "big")

    def get_blob(self, kind: int, flags: int = 1, offset: int = 0) -> tuple[int, int, bytes]:
        """GET_STATEBLOB: result, flags and the blob; both lengths agree."""
        self.send(u32(GET_STATEBLOB, flags, kind, offset))
        result, out_flags, total, length = struct.unpack(">4I", self.exactly(16))
        assert total == length
        return result, out_flags, self.exactly(length)

    def set_blob(self, kind: int, blob: bytes, flags: int = 0) -> int:
        return self.result(SET_STATEBLOB, u32(flags, kind, len(blob)) + blob)

    def info(self, flags: int, offset: int = 0) -> tuple[int, bytes]:
        """GET_INFO: total length and the piece."""
        self.send(u32(GET_INFO) + struct.pack(">QII", flags, offset, 0))
        result, total, length = struct.unpack(">3I", self.exactly(12))
        assert result == 0
        return total, self.exactly(length)

    def set_data_fd(self, *fds: int, number: int = SET_DATAFD, at_once: int = 4) -> int:
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds).tobytes())
        self.socket.sendmsg([u32(number)[:at_once]], [rights])
        for byte in u32(number)[at_once:]:
            self.socket.send(bytes([byte]))
        return int.from_bytes(self.exactly(4), "big")


def listener(path: Path | None = None) -> socket.socket:
    """A listening socket: Unix at *path*, else TCP."""
    if path is None:
        return socket.create_server(("127.0.0.1", 0), backlog=64)
    made = socket.socket(socket.AF_UNIX)
    made.bind(str(path))
    made.listen(64)
    return made


def connect(address: Path | int) -> Client:
    """To a Unix path, or to a TCP port of 127.0.0.1."""
    if isinstance(address, int):
        return Client(socket.create_connection(("127.0.0.1", address)))
    made = socket.socket(socket.AF_UNIX)
    made.connect(str(address))
    return Client(made)


def listens(path: Path) -> bool:
    """Whether a Unix socket of this name takes connections; its name is there a moment before."""
    accepts = 0x10000  # __SO_ACCEPTCON of the kernel's list
    lines = Path("/proc/net/unix").read_text(errors="surrogateescape").splitlines()
    rows = (line.split(maxsplit=7) for line in lines[1:])
    return any(int(row[3], 16) & accepts and row[7:] == [str(path)] for row in rows)


def is_read(connection: socket.socket) -> bool:
    """Whether the other end has taken all that was sent."""
    return fcntl.ioctl(connection, termios.TIOCOUTQ, bytes(4)) == bytes(4)


def readable(connection: socket.socket | int, seconds: float = 0) -> bool:
    """Whether something, or the end, has come, or comes within *seconds*."""
    return bool(select.select([connection], [], [], seconds)[0])


def free_ports() -> int:
    """The first of two adjacent TCP ports that were free just now."""
    for port in range(20000 + os.getpid() % 10000, 65000, 2):
        with contextlib.ExitStack() as stack:
            try:
                for number in (port, port + 1):
                    made = stack.enter_context(socket.socket())
                    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    made.bind(("127.0.0.1", number))
            except OSError:
                continue
            return port
    raise AssertionError("no free ports")


def _start(
    program: Sequence[str], arguments: Sequence[str], fds: Sequence[int]
) -> subprocess.Popen[bytes] | Forked:
    if zygote.warm and program == OURS:
        return zygote.warm[-1].silent([_INSTALLED, *arguments], fds)
    return subprocess.Popen(
        [*program, *arguments], stdin=subprocess.DEVNULL, pass_fds=fds, env=environment()
    )


class Server:
    """A running `swtpm socket`.

    The control channel, and the data channel where it is a Unix socket, listen before the
    process exists, so a client can connect at once and is served in time.

    Args:
        folder: For state, sockets and log.
        words: More options.
        tpm2: Version of the TPM.
        data: "unixio" or "tcp" for a data channel of its own, None for none.
        control: The same for the control channel.
        state: State directory; by default one below *folder*.
        pass_fds: Descriptors the process inherits.
    """

    def __init__(
        self,
        folder: Path,
        *words: str | Path,
        tpm2: bool = True,
        data: str | None = "unixio",
        control: str | None = "unixio",
        state: Path | None = None,
        pass_fds: Sequence[int] = (),
        program: Sequence[str] = OURS,
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.state = state or folder / "state"
        self.state.mkdir(exist_ok=True)
        self.log = folder / "log"
        self.data_address: Path | int = folder / "data"
        self.control_address: Path | int = folder / "ctrl"
        arguments = ["socket", *(["--tpm2"] if tpm2 else [])]
        arguments += ["--tpmstate", f"dir={self.state}", "--log", f"file={self.log},level=2"]
        with contextlib.ExitStack() as stack:
            fds = list(pass_fds)
            if data == "unixio":
                sock = stack.enter_context(listener(folder / "data"))
                fds.append(sock.fileno())
                arguments += ["--server", f"type=unixio,fd={sock.fileno()}"]
            elif data == "tcp":
                self.data_address = free_ports()
                arguments += ["--server", f"type=tcp,port={self.data_address}"]
            if control is not None:
                sock = stack.enter_context(listener(None if control == "tcp" else folder / "ctrl"))
                if control == "tcp":
                    self.control_address = sock.getsockname()[1]
                fds.append(sock.fileno())
                arguments += ["--ctrl", f"type={control},fd={sock.fileno()}"]
            self.process = _start(program, [*arguments, *map(str, words)], fds)
        if control is not None and data == "tcp":
            with self.control() as client:  # once it answers, all its sockets listen
                assert client.control(GET_CAPABILITY, size=8)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def data(self) -> Client:
        return connect(self.data_address)

    def control(self) -> Client:
        return connect(self.control_address)

    def request(self, number: int, body: bytes = b"", size: int = 4) -> bytes:
        """One control request on a connection of its own."""
        with self.control() as client:
            return client.control(number, body, size)

    def init(self, flags: int = 0) -> int:
        return int.from_bytes(self.request(INIT, u32(flags)), "big")

    def wait(self) -> int:
        """The exit status, once it has ended."""
        return self.process.wait(PATIENCE_SECONDS)

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def settle(self, descriptors: int) -> None:
        """Waits until it has let go of all its clients, and so has no more than *descriptors*."""
        wait_until(
            lambda: self.descriptors() <= descriptors,
            f"no more than {descriptors} open descriptors",
            process=self.process,
            seconds=PATIENCE_SECONDS,
        )

    def resident_kib(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0])

    def log_text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


@contextlib.contextmanager
def socket_pair() -> Iterator[tuple[Client, socket.socket]]:
    """A client, and the end that a server is given."""
    ours, theirs = socket.socketpair()
    with Client(ours) as client, theirs:
        yield client, theirs


def is_locked(state: Path) -> bool:
    """Whether a server holds the state; asks by trying."""
    with open(state / ".lock", "rb+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
        return False
