"""Readiness for service managers: the datagrams of sd_notify(3).

By hand, for systemd-python needs a compiler to be installed, and a message is one line of text.
"""

from __future__ import annotations

import logging
import os
import socket

log = logging.getLogger(__name__)

_manager: socket.socket | None = None


def connect() -> None:
    """Connects to the manager that NOTIFY_SOCKET names, if any; before a sandbox or a new root."""
    global _manager
    path = os.environ.pop("NOTIFY_SOCKET", "")
    if path[:1] not in {"/", "@"} or _manager is not None:
        return
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    try:
        sock.connect(f"\0{path[1:]}" if path[0] == "@" else path)
    except OSError as exc:
        sock.close()
        log.warning("Could not reach the service manager at %s: %s", path, exc.strerror or exc)
    else:
        _manager = sock


def ready() -> None:
    """Clients are served; by this process, which need not be the one that was started."""
    _tell(f"READY=1\nMAINPID={os.getpid()}")


def stopping() -> None:
    """The service is about to end."""
    _tell("STOPPING=1")


def _tell(state: str) -> None:
    if _manager is not None:
        try:
            _manager.send(state.encode())
        except OSError as exc:
            log.warning("Could not tell the service manager: %s", exc.strerror)
