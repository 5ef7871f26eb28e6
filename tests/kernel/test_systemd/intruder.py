"""What one instance might do to another, each a way that works for root. Says which of them worked.

A program of its own, run as an instance: ``intruder.py NAME PID MAJOR MINOR``, of the other one.
"""

from __future__ import annotations

import json
import os
import pathlib
import signal
import stat
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

other, pid, major, minor = sys.argv[1], *map(int, sys.argv[2:])
own = pathlib.Path(os.environ["STATE_DIRECTORY"])
permall = f"vtpm-cuse/{other}/tpm2-00.permall"


def read(path: str) -> None:
    with open(path, "rb") as file:
        file.read(1)


def use(path: str | pathlib.Path) -> None:
    os.close(os.open(path, os.O_RDWR))


def make_node() -> None:
    os.mknod(own / "node", stat.S_IFCHR | 0o600, os.makedev(major, minor))
    use(own / "node")


ways: dict[str, Callable[[], object]] = {
    "its own state": lambda: (own / "mine").write_text("x"),
    "state": lambda: read(f"/var/lib/private/{permall}"),
    "state by its link": lambda: read(f"/var/lib/{permall}"),
    "state through the process": lambda: read(f"/proc/{pid}/root/var/lib/private/{permall}"),
    "state, written": lambda: use(f"/var/lib/private/{permall}"),
    "key": lambda: read(f"/etc/vtpm-cuse/{other}.key"),
    "key in a folder": lambda: read(f"/etc/vtpm-cuse/{other}/key"),
    "key through the process": lambda: read(f"/proc/{pid}/root/etc/vtpm-cuse/{other}.key"),
    "settings": lambda: read(f"/etc/vtpm-cuse/{other}.env"),
    "credential": lambda: read(f"/run/credentials/swtpm-cuse@{other}.service/state.key"),
    "device": lambda: use(f"/dev/{other}"),
    "device by a node of its own": make_node,
    "signal": lambda: os.kill(pid, 0),
    "signal by pidfd": lambda: signal.pidfd_send_signal(os.pidfd_open(pid), 0),
    "memory": lambda: use(f"/proc/{pid}/mem"),
    "environment": lambda: read(f"/proc/{pid}/environ"),
}
worked = []
for name, way in ways.items():
    try:
        way()
    except OSError:
        continue
    worked.append(name)
(own / "worked").write_text(json.dumps([worked, list(ways)]))
