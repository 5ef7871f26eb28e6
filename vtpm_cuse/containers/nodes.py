"""Device nodes of the kernel's TPMs: found, waited for, made and owned.

What is there is looked up in sysfs; the kernel's events only say when it is time to look again, so
it is no matter which of them are heard.
"""

from __future__ import annotations

import os
import pwd
import select
import stat
import subprocess
from pathlib import Path
from time import monotonic
from typing import Final, NamedTuple

from vtpm_cuse.errors import FrontendError
from vtpm_cuse.programs import find_program

CLASSES: Final = Path("/sys/class")
DEVICES: Final = Path("/dev")
UDEV: Final = Path("/run/udev/control")
_USERS_OF_TPMS: Final = "tss"  # who owns a TPM where tpm-udev is installed
_NODE_SECONDS: Final = 0.2

Event = dict[str, str]


class Node(NamedTuple):
    """A device node: its path, its numbers, and its path in every container."""

    path: Path
    major: int
    minor: int
    inside: str

    @property
    def device(self) -> int:
        """Both numbers in one."""
        return os.makedev(self.major, self.minor)


class Access(NamedTuple):
    """Who may use the nodes; None leaves that as it is."""

    uid: int | None = None
    gid: int | None = None
    mode: int | None = None


class Events:
    """All of the kernel's events from now on.

    In the network namespace of a container there may be none.

    Args:
        until: A descriptor; once it can be read, nobody waits any more.

    Raises:
        FrontendError: They cannot be heard.
    """

    def __init__(self, until: int = -1) -> None:
        # Slow, and wanted by few programs, never by the process that serves.
        from pyroute2.netlink.uevent import UeventSocket

        try:
            self._socket = UeventSocket()
            self._socket.bind()
        except OSError as exc:
            raise FrontendError(f"Could not listen to the kernel: {exc.strerror}") from exc
        self._until = until
        self._poll = select.poll()
        self._poll.register(self._socket.fileno(), select.POLLIN)
        if until >= 0:
            self._poll.register(until, select.POLLIN)

    def wait(self, seconds: float) -> list[Event]:
        """Those of the next moment that has any; none if it does not come in time.

        Raises:
            FrontendError: Nobody waits any more.
        """
        ready = {fd for fd, _ in self._poll.poll(seconds * 1000)}
        if self._until in ready:
            raise FrontendError("Nobody waits any more")
        return list(self._socket.get()) if ready else []

    def close(self) -> None:
        """Hears no more."""
        self._socket.close()


def nodes_of(number: int, *, tpm2: bool | None = None) -> list[Node] | None:
    """All nodes of TPM *number*, or None until the last of them is there.

    Args:
        number: As in /dev/tpmN.
        tpm2: Its version, if that is known without asking the kernel.
    """
    plain = _node_of(f"tpm{number}")
    if plain is None:
        return None
    if tpm2 is None:
        try:
            version = (CLASSES / f"tpm/tpm{number}/tpm_version_major").read_text().strip()
        except OSError:  # it has just gone again
            return None
        tpm2 = version != "1"
    if not tpm2:
        return [plain]
    shared = _node_of(f"tpmrm{number}")
    return None if shared is None else [plain, shared]


def _node_of(name: str) -> Node | None:
    kind = name.rstrip("0123456789")
    try:
        major, minor = (CLASSES / kind / name / "dev").read_text().split(":")
    except OSError:
        return None
    return Node(DEVICES / name, int(major), int(minor), f"/dev/{kind}0")


def wait_for(
    events: Events, number: int, seconds: float, *, tpm2: bool | None = None
) -> list[Node]:
    """Sleeps until the kernel has all that belongs to a TPM; returns its nodes.

    Args:
        events: From before; asked between two looks, so that nothing is missed.
        number: As in /dev/tpmN.
        seconds: Waits no longer.
        tpm2: As for `nodes_of`.

    Raises:
        FrontendError: It has not come, or has gone again.
    """
    device, deadline = f"/dev/tpm{number}", monotonic() + seconds
    while (nodes := nodes_of(number, tpm2=tpm2)) is None:
        left = deadline - monotonic()
        if left <= 0:
            raise FrontendError(f"{device} has not come within {seconds:g} s", "see dmesg")
        for event in events.wait(left):
            path = event.get("DEVPATH", "")
            if event.get("ACTION") == "remove" and path.endswith(f"/tpm/tpm{number}"):
                raise FrontendError(f"{device} has gone again: its TPM has ended")
    # In /dev a moment later than in sysfs; in a container, perhaps, not at all.
    deadline = monotonic() + _NODE_SECONDS
    while not all(os.path.lexists(node.path) for node in nodes):
        left = deadline - monotonic()
        if left <= 0:
            break
        events.wait(left)
    return nodes


def open_up(nodes: list[Node], wanted: Access) -> None:
    """Makes the nodes that are missing; sets owner and mode, where no udev does so.

    Raises:
        FrontendError: One cannot be made, or its place is taken; there is udev without udevadm.
    """
    access = wanted
    if UDEV.exists():
        program = find_program("udevadm")
        if program is None:
            raise FrontendError("udevadm not found", "install the package udev")
        subprocess.run([program, "settle"], check=False)  # noqa: S603 - words of ours
    elif wanted == Access():
        access = _usual_access()
    for node in nodes:
        try:
            _open_up(node, access)
        except OSError as exc:
            raise FrontendError(f"{node.path}: {exc.strerror}") from exc


def _usual_access() -> Access:
    """As the package tpm-udev has it."""
    try:
        user = pwd.getpwnam(_USERS_OF_TPMS)
    except KeyError:
        return Access(0, 0, 0o600)
    return Access(user.pw_uid, user.pw_gid, 0o660)


def _open_up(node: Node, access: Access) -> None:
    if not node.path.exists():
        os.mknod(node.path, stat.S_IFCHR | 0o600, node.device)
    if node.path.stat().st_rdev != node.device:
        raise FrontendError(f"{node.path} is another device's node: remove it")
    uid = -1 if access.uid is None else access.uid
    gid = -1 if access.gid is None else access.gid
    if (uid, gid) != (-1, -1):
        os.chown(node.path, uid, gid)
    if access.mode is not None:
        node.path.chmod(access.mode)
