"""Which process a connection on a Unix socket comes from, where a process is a client.

The kernel tells the number that the process had at its connect(2), which may be another one's by
the time that it is read. So a descriptor of the process comes with it (SO_PEERPIDFD), which says
whether it lives: as long as it does, no other process has its number, and a connection that names
that and came later is its own. What connects as another user or group is another client, and so is
each connection of a process whose PID namespace has no numbers here.
"""

from __future__ import annotations

import os
import select
from typing import TYPE_CHECKING, NamedTuple

import trio

from vtpm_cuse.acquire.peers import Credentials, process_of

if TYPE_CHECKING:
    import socket

    from vtpm_cuse.vtpm.clients import Client


class SavedProcess(NamedTuple):
    """A process as plain values.

    Attributes:
        credentials: Of its first connection.
        fd: Its descriptor; -1 if it has ended.
        client: The client's number.
    """

    credentials: Credentials
    fd: int
    client: int


class Process:
    """One that has a client.

    Attributes:
        credentials: Of its first connection.
        fd: It stands for the process, whatever has its number.
        client: What all its connections are.
        connections: How many there are now.
    """

    def __init__(self, credentials: Credentials, fd: int, client: Client) -> None:
        self.credentials = credentials
        self.fd = fd
        self.client = client
        self.connections = 0
        self._watch = trio.CancelScope()

    @property
    def ended(self) -> bool:
        """Whether it lives no more."""
        if self.fd < 0:
            return True
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        return bool(poll.poll(0))

    async def end(self) -> bool:
        """Waits for that; False when nobody wants to know any more. Closes the descriptor."""
        try:
            with self._watch:
                if self.fd >= 0:  # else it was suspended before this began
                    await trio.lowlevel.wait_readable(self.fd)
                    return True
            return False
        finally:
            self.close()

    def close(self) -> None:
        """It counts as ended from now on. Again is harmless."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def forget(self) -> None:
        """Its client has ended."""
        self._watch.cancel()

    def suspend(self) -> SavedProcess:
        """As plain values; the descriptor is the caller's from now on."""
        fd, self.fd = self.fd, -1
        return SavedProcess(self.credentials, fd, self.client.connection.number)


class Processes:
    """Those that have a client, in the order in which they came."""

    def __init__(self) -> None:
        self._known: list[Process] = []

    def find(self, connection: socket.socket) -> Process | None:
        """The one that a new connection comes from, if it has a client."""
        fd = process_of(connection)
        if fd is None:
            return None
        credentials = Credentials.of(connection)
        try:
            for known in self._known:
                alive = known.credentials == credentials and not known.ended
                if alive and os.path.sameopenfile(known.fd, fd):
                    return known
        finally:
            os.close(fd)
        return None

    def begin(self, connection: socket.socket, client: Client) -> Process | None:
        """A process that has none yet; None where nobody can tell which one it is."""
        fd = process_of(connection)
        if fd is None:
            return None
        found = Process(Credentials.of(connection), fd, client)
        self._known.append(found)
        return found

    def resume(self, saved: SavedProcess, client: Client) -> Process:
        """One as it was suspended, without connections."""
        found = Process(saved.credentials, saved.fd, client)
        self._known.append(found)
        return found

    def of(self, client: Client) -> Process | None:
        """The one that a client is, if it is one."""
        return next((known for known in self._known if known.client is client), None)

    def forget(self, process: Process) -> None:
        """Its client has ended. Again is harmless."""
        if process in self._known:
            self._known.remove(process)
            process.forget()

    def suspend(self) -> tuple[SavedProcess, ...]:
        """All of them as plain values; the descriptors are the caller's from now on."""
        return tuple(known.suspend() for known in self._known)

    def away(self) -> list[Client]:
        """The clients that have no connection now."""
        return [known.client for known in self._known if not known.connections]
