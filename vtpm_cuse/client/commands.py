"""Sending TPM commands from outside: to a device, or to the data channel of an emulator."""

from __future__ import annotations

import contextlib
import os
import select
import stat
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vtpm_cuse.client.connect import connect_tcp, connect_unix
from vtpm_cuse.errors import FrontendError
from vtpm_cuse.wire.layout import BIG
from vtpm_cuse.wire.tpm import TPM_HEADER_SIZE, TPM_RESPONSE_MAX, TpmHeader

if TYPE_CHECKING:
    from collections.abc import Iterator


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


def send_command(address: TpmAddress, command: bytes, seconds: float) -> bytes:
    """Sends one command on a connection of its own; gives the response, a header at least.

    Raises:
        FrontendError: The TPM cannot be reached, does not answer in time, or answers nonsense.
    """
    until = time.monotonic() + seconds
    late = f"TPM did not respond after {seconds:.0f} seconds."
    with address.opened() as fd:
        while command:
            _wait(fd, select.POLLOUT, until, late)
            try:
                command = command[os.write(fd, command) :]
            except BlockingIOError:
                continue
            except OSError as exc:
                raise FrontendError("Write to file descriptor failed.", _reason(exc)) from exc
        response = b""
        while len(response) < (size := _size(response)):
            _wait(fd, select.POLLIN, until, late)
            try:
                part = os.read(fd, size - len(response) if response else TPM_RESPONSE_MAX)
            except BlockingIOError:
                continue
            except OSError as exc:
                raise FrontendError("Read from file descriptor failed.", _reason(exc)) from exc
            if not part:
                raise FrontendError("Returned packet is too short.")
            response += part
        if len(response) != size:
            raise FrontendError("Malformed response.")
        return response


def _size(response: bytes) -> int:
    """How long the response is going to be, as far as is known. Raises FrontendError."""
    if len(response) < TPM_HEADER_SIZE:
        return TPM_HEADER_SIZE
    size = TpmHeader.unpack_untrusted(response, BIG).size
    if not TPM_HEADER_SIZE <= size <= TPM_RESPONSE_MAX:
        raise FrontendError("Malformed response.")
    return size


def _wait(fd: int, event: int, until: float, late: str) -> None:
    poll = select.poll()
    poll.register(fd, event)
    left = until - time.monotonic()
    if left <= 0 or not poll.poll(left * 1000):
        raise FrontendError(late)


def _reason(exc: OSError) -> str:
    return exc.strerror or str(exc)
