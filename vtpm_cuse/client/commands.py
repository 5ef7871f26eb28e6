"""Sending TPM commands from outside: to a device, or to the data channel of an emulator."""

from __future__ import annotations

import contextlib
import os
import select
import stat
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from vtpm_cuse.client.connect import connect_tcp, connect_unix
from vtpm_cuse.errors import FrontendError
from vtpm_cuse.wire.layout import BIG
from vtpm_cuse.wire.tpm import TPM_HEADER_SIZE, TPM_RESPONSE_MAX, TpmHeader

if TYPE_CHECKING:
    from collections.abc import Iterator

_PORT_MAX: Final = (1 << 16) - 1
_PORT_DIGITS: Final = 5


@dataclass(frozen=True, slots=True)
class TpmDevice:
    """A character device."""

    path: str

    @contextlib.contextmanager
    def opened(self) -> Iterator[int]:
        """Its descriptor. Raises FrontendError."""
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOCTTY)
        except OSError as exc:
            raise FrontendError(f"Unable to open device '{self.path}'. {exc.strerror}") from exc
        try:
            # PEER: writes its command over the start of anything else that was named by mistake.
            if not stat.S_ISCHR(os.fstat(fd).st_mode):
                raise FrontendError(f"Unable to open device '{self.path}'. It is none")
            yield fd
        finally:
            os.close(fd)


@dataclass(frozen=True, slots=True)
class TpmTcp:
    """A TCP port."""

    host: str
    port: int

    @contextlib.contextmanager
    def opened(self) -> Iterator[int]:
        """The descriptor of a new connection. Raises FrontendError."""
        try:
            made = connect_tcp(self.host, self.port)
        except OSError as exc:
            reason = "timed out" if isinstance(exc, BlockingIOError) else _reason(exc)
            raise FrontendError("Could not connect using TCP socket.", reason) from exc
        with made:
            made.setblocking(False)
            yield made.fileno()


@dataclass(frozen=True, slots=True)
class TpmUnix:
    """A Unix socket."""

    path: str

    @contextlib.contextmanager
    def opened(self) -> Iterator[int]:
        """The descriptor of a new connection. Raises FrontendError."""
        try:
            made = connect_unix(self.path)
        except OSError as exc:
            raise FrontendError("Could not connect using UnixIO socket.", _reason(exc)) from exc
        with made:
            made.setblocking(False)
            yield made.fileno()


TpmAddress = TpmDevice | TpmTcp | TpmUnix


def address_of(text: str) -> TpmAddress:
    """The TPM at *text*: the path of a device or of a Unix socket, or HOST:PORT.

    Raises:
        FrontendError: It is none of these.
    """
    if "/" in text:
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.stat(text).st_mode):
                return TpmUnix(text)
        return TpmDevice(text)
    host, _, port = text.rpartition(":")
    if port.isascii() and port.isdigit() and len(port) <= _PORT_DIGITS and int(port) <= _PORT_MAX:
        return TpmTcp(host.strip("[]") or "127.0.0.1", int(port))
    raise FrontendError(f"'{text}' is neither the path of a device or socket nor HOST:PORT")


class TpmConnection:
    """One connection to a TPM, for one command after the other; see `connected`."""

    def __init__(self, fd: int, seconds: float) -> None:
        self._fd, self._seconds, self._until = fd, seconds, 0.0
        self._command = self._response = b""

    def ask(self, command: bytes) -> bytes:
        """The response, a header at least. Raises FrontendError."""
        self._until = time.monotonic() + self._seconds
        self._command, self._response = command, b""
        return self.finish()

    def finish(self) -> bytes:
        """The response to the last command, for who was interrupted meanwhile. Raises FrontendError."""
        while self._command:
            self._wait(select.POLLOUT)
            try:
                self._command = self._command[os.write(self._fd, self._command) :]
            except BlockingIOError:
                continue
            except OSError as exc:
                raise FrontendError("Write to file descriptor failed.", _reason(exc)) from exc
        while (left := _size(self._response) - len(self._response)) > 0:
            self._wait(select.POLLIN)
            try:
                part = os.read(self._fd, left if self._response else TPM_RESPONSE_MAX)
            except BlockingIOError:
                continue
            except OSError as exc:
                raise FrontendError("Read from file descriptor failed.", _reason(exc)) from exc
            if not part:
                raise FrontendError("Returned packet is too short.")
            self._response += part
        if left:
            raise FrontendError("Malformed response.")
        return self._response

    def _wait(self, event: int) -> None:
        poll = select.poll()
        poll.register(self._fd, event)
        left = self._until - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            raise FrontendError(f"TPM did not respond after {self._seconds:.0f} seconds.")


@contextlib.contextmanager
def connected(address: TpmAddress, seconds: float) -> Iterator[TpmConnection]:
    """A connection, for commands that have *seconds* each.

    Where a resource manager serves it, what they load is there as long as the connection.

    Raises:
        FrontendError: There and then: the TPM cannot be reached, does not answer in time, or
            answers nonsense.
    """
    with address.opened() as fd:
        yield TpmConnection(fd, seconds)


def send_command(address: TpmAddress, command: bytes, seconds: float) -> bytes:
    """Sends one command on a connection of its own; gives the response, a header at least.

    Raises:
        FrontendError: See `connected`.
    """
    with connected(address, seconds) as connection:
        return connection.ask(command)


def _size(response: bytes) -> int:
    """How long the response is going to be, as far as is known. Raises FrontendError."""
    if len(response) < TPM_HEADER_SIZE:
        return TPM_HEADER_SIZE
    size = TpmHeader.unpack_untrusted(response, BIG).size
    if not TPM_HEADER_SIZE <= size <= TPM_RESPONSE_MAX:
        raise FrontendError("Malformed response.")
    return size


def _reason(exc: OSError) -> str:
    return exc.strerror or str(exc)
