"""The two programs under comparison, and how an exchange reaches them."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.differential.exchanges import GET_CAPABILITY, SHUTDOWN, Way, ptm
from tests.support.sockets import is_read
from tests.support.waiting import TooLateError, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.differential.exchanges import Exchange, Session

PEER: Final = "/usr/bin/swtpm"
OURS: Final = str(Path(sys.executable).parent / "swtpm")
PATIENCE_SECONDS: Final = 20
"""For what would otherwise hang for ever; nothing depends on it."""

SILENCE: Final = b"(no answer)"
GONE: Final = b"(not there)"
ENOUGH_SILENCES: Final = 4
_KEY: Final = "0123456789abcdef0123456789abcdef"


@dataclass
class Server:
    """One running program."""

    process: subprocess.Popen[bytes]
    folder: Path
    tpm2: bool
    data: socket.socket | None = None
    silences: int = 0

    def exchange(self, exchange: Exchange, message: bytes) -> bytes:
        """What comes back."""
        try:
            if exchange.way is Way.DATA:
                return self._converse(message)
            self._drop()  # a second data client would have to wait
            name = "control" if exchange.way is Way.CONTROL else "data"
            with self.connect(name) as connection:
                self._send_parts(connection, message, exchange.cut)
                connection.shutdown(socket.SHUT_WR)
                return _read_all(connection)
        except (TimeoutError, TooLateError, ConnectionError) as exc:
            self._drop()
            self.silences += 1
            assert self.silences < ENOUGH_SILENCES, f"no answer to {exchange.name}"
            return GONE if isinstance(exc, ConnectionError) else SILENCE

    def end(self) -> tuple[int, dict[str, int]]:
        """Shuts it down; returns the exit status and the sizes of the files it leaves."""
        self._drop()
        with contextlib.suppress(ConnectionError), self.connect("control") as connection:
            connection.sendall(ptm(SHUTDOWN))
            connection.recv(4)
        status = self.process.wait(PATIENCE_SECONDS)
        return status, {
            path.name: path.stat().st_size
            for path in self.folder.iterdir()
            if path.suffix != ".log"
        }

    def connect(self, name: str) -> socket.socket:
        """A new connection to the data or the control channel."""
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(PATIENCE_SECONDS)
        try:
            connection.connect(str(self.folder / name))
        except OSError:
            connection.close()
            raise
        return connection

    def _converse(self, message: bytes) -> bytes:
        """On the connection that stays; an answer says how long it is."""
        if self.data is None:
            self.data = self.connect("data")
        self.data.sendall(message)
        head = 14 if self.tpm2 and message[:4] == bytes((0, 0, 0, 8)) else 10
        answer = b""
        wanted = head
        while len(answer) < wanted:
            part = self.data.recv(1 << 16)
            if not part:
                raise ConnectionResetError
            answer += part
            if len(answer) >= head:
                wanted = int.from_bytes(answer[head - 8 : head - 4], "big") + 2 * (head - 10)
        return answer  # and whatever came with it

    def _drop(self) -> None:
        if self.data is not None:
            self.data.close()
            self.data = None

    @staticmethod
    def _send_parts(connection: socket.socket, message: bytes, cut: int) -> None:
        if cut:
            connection.sendall(message[:cut])
            _wait_until_read(connection)
        connection.sendall(message[cut:])


def _wait_until_read(connection: socket.socket) -> None:
    """The server has taken all that was sent."""
    wait_until(lambda: is_read(connection), "the first part is read", seconds=PATIENCE_SECONDS)


def _read_all(connection: socket.socket) -> bytes:
    found = b""
    while part := connection.recv(1 << 16):
        found += part
    return found


@contextlib.contextmanager
def started(program: str, session: Session, folder: Path, state: Path) -> Iterator[Server]:
    """The program, with a copy of *state*, listening."""
    if session.file_key:
        folder.mkdir()  # the state that is there is not encrypted
    else:
        shutil.copytree(state, folder)
    words = [program, "socket", "--tpmstate", f"dir={folder}"]
    words += ["--server", f"type=unixio,path={folder}/data"]
    words += ["--ctrl", f"type=unixio,path={folder}/control"]
    words += ["--log", f"file={folder}/server.log"]
    words += ["--tpm2"] * session.tpm2
    words += ["--flags", ",".join(session.flags)] if session.flags else []
    words += ["--locality", ",".join(session.locality)] if session.locality else []
    for option, given in (("key", session.file_key), ("migration-key", session.migration_key)):
        if given:
            key = folder.parent / f"{folder.name}-{option}"
            key.write_text(_KEY)
            words += [f"--{option}", f"file={key},mode=aes-cbc,remove"]
    with subprocess.Popen(words) as process:
        server = Server(process, folder, session.tpm2)
        try:
            _wait_for(server)
            yield server
        finally:
            process.kill()


def _wait_for(server: Server) -> None:
    """Until the control channel answers: then both channels are there, and no data client was."""

    def answers() -> bool:
        try:
            with server.connect("control") as connection:
                connection.sendall(ptm(GET_CAPABILITY))
                return bool(connection.recv(8))
        except (FileNotFoundError, ConnectionError):
            return False

    wait_until(
        answers,
        "the server listens",
        process=server.process,
        log=server.folder / "server.log",
        seconds=PATIENCE_SECONDS,
    )


def make_state(folder: Path, *, tpm2: bool) -> Path:
    """A TPM made by the C suite, so that both programs start from the same seeds."""
    folder.mkdir()
    words = [PEER, "socket", "--tpmstate", f"dir={folder}", "--print-info", "0x1"]
    words += ["--tpm2"] * tpm2
    words += ["--flags", "not-need-init,startup-clear"]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return folder
