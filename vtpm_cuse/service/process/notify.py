"""Readiness for service managers: the datagrams of sd_notify(3).

By hand: sdnotify takes no descriptor, as is needed below another root, where the path is somebody
else's. systemd-python has to be compiled, and makes a socket for each message: a sandbox allows
none.
"""

from __future__ import annotations

import logging
import os
import socket
from typing import Final

log = logging.getLogger(__name__)

_VARIABLE: Final = "NOTIFY_SOCKET"
_DESCRIPTOR: Final = "fd:"
_STORE: Final = "FDSTORE"
_DIGITS_MAX: Final = 9


class ServiceManager:
    """Who waits for this process to be ready, if anybody does; no child of it speaks for it."""

    def __init__(self, connection: socket.socket | None) -> None:
        self._connection = connection
        self._process = os.getpid()

    @property
    def waits(self) -> bool:
        """Whether there is one."""
        return self._connection is not None

    @property
    def keeps(self) -> bool:
        """Whether it keeps descriptors for the next process of this service.

        systemd says so since version 254; for an older one, the unit does.
        """
        most = os.environ.get(_STORE, "")
        digits = most.isascii() and most.isdecimal() and len(most) <= _DIGITS_MAX
        return self.waits and digits and int(most) > 0

    def store(self, name: str, fd: int) -> None:
        """Has it keep a duplicate of *fd* for the next process of this service. It does not answer."""
        self._tell(f"FDSTORE=1\nFDNAME={name}", fd)

    def forget(self, name: str) -> None:
        """It is to close all of that name."""
        self._tell(f"FDSTOREREMOVE=1\nFDNAME={name}")

    def ready(self, *, in_background: bool) -> None:
        """Clients are served; by another process than was started, where it is *in_background*.

        Each word has a datagram of its own: some compare the first one with READY=1, as the C suite
        sends it. The other follows before the process ends that was started, so that systemd, which
        reads datagrams before it looks who has ended, does not take the service for ended.
        """
        self._tell("READY=1")
        if in_background:
            self._tell(f"MAINPID={self._process}")

    def stopping(self) -> None:
        """The service is about to end."""
        self._tell("STOPPING=1")

    def hand_on(self) -> list[int]:
        """The descriptors that `connect` needs in the program that takes this one's place.

        It finds them by the environment of that.
        """
        if self._connection is None:
            return []
        fd = self._connection.fileno()
        os.environ[_VARIABLE] = f"{_DESCRIPTOR}{fd}"
        return [fd]

    def _tell(self, state: str, fd: int | None = None) -> None:
        if self._connection is None or os.getpid() != self._process:
            return
        try:
            if fd is None:
                self._connection.send(state.encode())  # a sandbox allows no descriptors
            else:
                socket.send_fds(self._connection, [state.encode()], [fd])
        except OSError as exc:
            log.warning("Could not tell the service manager: %s", exc.strerror)


def connect() -> ServiceManager:
    """Takes the manager that NOTIFY_SOCKET names, if any, for this process; before a sandbox."""
    return ServiceManager(_connected())


def keep() -> None:
    """Lets `connect` work below another root: the variable then names a descriptor."""
    if (connection := _connected()) is not None:
        os.environ[_VARIABLE] = f"{_DESCRIPTOR}{connection.detach()}"


def _connected() -> socket.socket | None:
    name = os.environ.pop(_VARIABLE, "")
    try:
        if name.startswith(_DESCRIPTOR):
            return socket.socket(fileno=int(name.removeprefix(_DESCRIPTOR)))
        if name[:1] in {"/", "@"}:
            return _connected_to(f"\0{name[1:]}" if name[0] == "@" else name)
    except (OSError, ValueError, OverflowError) as exc:
        reason = getattr(exc, "strerror", None) or exc
        log.warning("Could not reach the service manager at %s: %s", name, reason)
    return None


def _connected_to(address: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    try:
        connection.connect(address)
    except BaseException:
        connection.close()
        raise
    return connection
