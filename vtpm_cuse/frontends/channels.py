"""The sockets of a vTPM, free of trio: they are bound before anything slow is imported."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import socket

    from vtpm_cuse.frontends.chardev import CharDevice


@dataclass
class Channels:
    """The sockets and the device a server takes over, all non-blocking, and when it ends by itself.

    Attributes:
        data_listener: Accepts data connections, one at a time.
        data_stream: A connected data socket, or a device; its end is the server's.
        control_listener: Accepts control connections.
        control_stream: A connected control socket.
        disconnect: Close a data connection after each response.
        terminate: End when there is no data connection after there was one.
        control_terminate: End when the control connection is closed.
    """

    data_listener: socket.socket | None = None
    data_stream: socket.socket | CharDevice | None = None
    control_listener: socket.socket | None = None
    control_stream: socket.socket | None = None
    disconnect: bool = False
    terminate: bool = False
    control_terminate: bool = False
    _own: dict[str, tuple[int, int] | None] = field(default_factory=dict)

    def own(self, path: str) -> None:
        """The path of a bound socket, to be removed in the end if it is still this one."""
        self._own[path] = _identity(path)

    def give_up_paths(self) -> list[str]:
        """The paths that `close` would remove: from now on they are somebody else's to remove."""
        paths = [path for path, identity in self._own.items() if _identity(path) == identity]
        self._own.clear()
        return paths

    def close(self) -> None:
        """Closes them; the paths of bound Unix sockets go too."""
        for sock in (
            self.data_listener,
            self.data_stream,
            self.control_listener,
            self.control_stream,
        ):
            if sock is not None:
                sock.close()
        for path, identity in self._own.items():
            with contextlib.suppress(OSError):
                if _identity(path) == identity:
                    os.unlink(path)
        self._own.clear()


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino
