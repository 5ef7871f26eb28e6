"""The sockets of a vTPM, free of trio: they are bound before anything slow is imported."""

from __future__ import annotations

import contextlib
import functools
import os
import select
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import socket

    from vtpm_cuse.acquire.chardev import CharDevice


class Endpoints:
    """The sockets and the device a server takes over, all non-blocking, and when it ends by itself.

    Attributes:
        data_listener: Accepts data connections, one at a time.
        data_stream: A connected data socket, or a device; its end is the server's.
        control_listener: Accepts control connections.
        control_stream: A connected control socket.
        managed_listener: Accepts clients of the resource manager.
        per_process: There, a client is a process, not a connection.
        disconnect: Close a data connection after each response.
        terminate: End when there is no data connection after there was one.
        control_terminate: End when the control connection is closed.
        passed_too: A data connection may be passed although there is a listener for them.
    """

    def __init__(
        self,
        *,
        data_listener: socket.socket | None = None,
        data_stream: socket.socket | CharDevice | None = None,
        control_listener: socket.socket | None = None,
        control_stream: socket.socket | None = None,
        disconnect: bool = False,
        terminate: bool = False,
        control_terminate: bool = False,
        passed_too: bool = False,
    ) -> None:
        self.data_listener = data_listener
        self.data_stream = data_stream
        self.control_listener = control_listener
        self.control_stream = control_stream
        self.disconnect = disconnect
        self.terminate = terminate
        self.control_terminate = control_terminate
        self.passed_too = passed_too
        self.managed_listener: socket.socket | None = None
        self.per_process = False
        self._reserve = -1
        self._own: dict[str, tuple[int, int] | None] = {}

    @functools.cached_property
    def epoll(self) -> select.epoll:
        """What clients of the resource manager are waited for with.

        It is made when it is first asked for, which is before the sandbox: that allows no more.
        """
        return select.epoll()

    def own(self, path: str) -> None:
        """The path of a bound socket, to be removed in the end if it is still this one."""
        self._own[path] = _identity(path)

    def give_up_paths(self) -> list[str]:
        """The paths that `close` would remove: from now on they are somebody else's to remove."""
        paths = [path for path, identity in self._own.items() if _identity(path) == identity]
        self._own.clear()
        return paths

    def regain_reserve(self) -> None:
        """Keeps a descriptor, if it can, for the connection that comes when there is none left."""
        listener = self.control_listener or self.data_listener or self.managed_listener
        if self._reserve < 0 and listener is not None:
            with contextlib.suppress(OSError):
                self._reserve = os.dup(listener.fileno())

    def spend_reserve(self) -> bool:
        """Frees that descriptor; False if there is none."""
        if self._reserve < 0:
            return False
        os.close(self._reserve)
        self._reserve = -1
        return True

    def withdraw(self) -> None:
        """Nobody can connect any more, and a successor can listen at the same addresses."""
        self.spend_reserve()
        for listener in (self.data_listener, self.control_listener, self.managed_listener):
            if listener is not None:
                listener.close()
        for path, identity in self._own.items():
            with contextlib.suppress(OSError):
                if _identity(path) == identity:
                    os.unlink(path)
        self._own.clear()

    def close(self) -> None:
        """Closes all; the paths of bound Unix sockets go too."""
        self.withdraw()
        for stream in (self.data_stream, self.control_stream):
            if stream is not None:
                stream.close()
        if "epoll" in vars(self):
            self.epoll.close()


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino
