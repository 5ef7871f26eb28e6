"""Acquires the sockets of `swtpm socket`, before anything that takes time."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from typing import TYPE_CHECKING

from vtpm_cuse.acquire.endpoints import Endpoints
from vtpm_cuse.acquire.peers import tells_process
from vtpm_cuse.errors import UsageError
from vtpm_cuse.files import give_socket

if TYPE_CHECKING:
    from vtpm_cuse.acquire.chardev import CharDevice
    from vtpm_cuse.config import SocketAddress, SocketConfig

_BACKLOG = 128
_KEEPALIVE_SECONDS = 60
_PATH_MAX = 107
_ACCEPTCON = 1 << 16  # __SO_ACCEPTCON, linux/net.h


def acquire(config: SocketConfig) -> Endpoints:
    """Binds, or takes over, all sockets of a configuration.

    Raises:
        UsageError: One of them cannot be had; none stays open.
    """
    endpoints = Endpoints(
        disconnect=config.disconnect,
        terminate=config.terminate,
        control_terminate=config.control_terminate,
    )
    with contextlib.ExitStack() as undo:
        undo.callback(endpoints.close)
        acquire_control(endpoints, config.control)
        acquire_managed(endpoints, config.managed)
        _acquire_data(endpoints, config.data)
        undo.pop_all()
    return endpoints


def acquire_control(endpoints: Endpoints, address: SocketAddress | None) -> None:
    """Binds, or takes over, the control channel, if there is one. Raises UsageError."""
    if address is None:
        return
    if address.fd is None and address.clientfd is not None:
        endpoints.control_stream = inherit(address.clientfd, listening=False)
    else:
        endpoints.control_listener = listen(endpoints, address)


def acquire_managed(endpoints: Endpoints, address: SocketAddress | None) -> None:
    """Binds, or takes over, where clients of the resource manager come. Raises UsageError."""
    if address is None:
        return
    if address.per_process and not tells_process():
        reason = "Error: This kernel does not tell which process connects, as per-process needs"
        raise UsageError(reason, hint="use Linux 6.5 or newer")
    endpoints.managed_listener = listen(endpoints, address)
    endpoints.per_process = address.per_process


def _acquire_data(endpoints: Endpoints, address: SocketAddress | None) -> None:
    if address is None:
        return
    if address.kind == "tcp" and address.fd is not None:
        endpoints.data_stream = take_stream(address.fd)
    else:
        endpoints.data_listener = listen(endpoints, address)


def listen(endpoints: Endpoints, address: SocketAddress) -> socket.socket:
    """Binds, or takes over, one whose path *endpoints* removes. Raises UsageError."""
    if address.fd is not None:
        return inherit(address.fd, listening=True)
    try:
        if address.path is not None:
            return _listen_unix(endpoints, address, address.path)
        return _listen_tcp(address)
    except OSError as exc:
        where = address.path or f"{address.bindaddr}:{address.port}"
        raise UsageError(f"Could not listen on {where}: {exc.strerror}") from exc


def take_stream(fd: int) -> CharDevice | socket.socket:
    """What a caller has passed to take commands from. Raises UsageError if it is of no such kind."""
    try:
        is_socket = stat.S_ISSOCK(os.fstat(fd).st_mode)
    except OSError:
        is_socket = False  # said below
    if is_socket:
        return inherit(fd, listening=False)
    from vtpm_cuse.acquire.chardev import take_device

    return take_device(fd)


def inherit(fd: int, *, listening: bool) -> socket.socket:
    """The socket of a descriptor, non-blocking. Raises UsageError if it is none of this kind."""
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise UsageError(f"File descriptor {fd} is not a socket")
        sock = socket.socket(fileno=fd)
        # PEER: accepts on a connected socket for ever, and fails.
        if bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)) != listening:
            sock.close()
            wanted = "a listening" if listening else "a connected"
            raise UsageError(f"File descriptor {fd} is not {wanted} socket")
    except OSError as exc:
        raise UsageError(f"Cannot use file descriptor {fd}: {exc.strerror}") from exc
    sock.setblocking(False)
    sock.set_inheritable(False)  # taken over
    _prepare_network(sock)
    return sock


def _prepare_network(sock: socket.socket) -> None:
    """What is accepted on a listening socket has these from it."""
    if sock.family in {socket.AF_INET, socket.AF_INET6}:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A client whose machine has gone does not keep the data channel for ever.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_SECONDS)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_SECONDS // 10)


def _listen_unix(endpoints: Endpoints, address: SocketAddress, path: str) -> socket.socket:
    if len(os.fsencode(path)) > _PATH_MAX:
        raise UsageError(f"Path for UnixIO socket is too long: {path}")
    _remove_leftover(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    umask = os.umask(0)
    try:
        os.fchmod(sock.fileno(), address.mode)  # of the path to come: nobody can swap it
        sock.bind(path)
        endpoints.own(path)
        if address.uid is not None or address.gid is not None:
            keep = -1
            uid = keep if address.uid is None else address.uid
            gid = keep if address.gid is None else address.gid
            give_socket(path, uid, gid)
        return _listening(sock)
    except BaseException:
        sock.close()
        raise
    finally:
        os.umask(umask)


def _remove_leftover(path: str) -> None:
    """Removes the socket of a process that was killed. Raises UsageError for anything else.

    PEER: removes whatever is there, also the socket of a process that lives.
    """
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise UsageError(f"{path} is there already and is no socket")
    except FileNotFoundError:
        return
    if _is_served(path):
        raise UsageError(f"{path} is in use by another process")
    with contextlib.suppress(FileNotFoundError):  # what clears up after that process was faster
        os.unlink(path)


def _is_served(path: str) -> bool:
    """Whether a socket of this path listens; asking by connecting would disturb its server."""
    wanted = os.fsencode(path)
    # Without /proc, as below another root, nobody can tell; the lock of the state still holds.
    with contextlib.suppress(FileNotFoundError), open("/proc/net/unix", "rb") as table:
        for line in table:
            fields = line.rstrip(b"\n").split(None, 7)
            if fields[7:] == [wanted] and int(fields[3], 16) & _ACCEPTCON:
                return True
    return False


def _listen_tcp(address: SocketAddress) -> socket.socket:
    family, target = _tcp_target(address)
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(target)
    except BaseException:
        sock.close()
        raise
    return _listening(sock)


def _tcp_target(
    address: SocketAddress,
) -> tuple[socket.AddressFamily, tuple[str, int] | tuple[str, int, int, int]]:
    """Family and address; numeric ones only, because names cost time and mean many."""
    host, port = address.bindaddr, address.port or 0
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        packed = socket.inet_pton(family, host)
    except (OSError, UnicodeError):
        raise UsageError(f"Could not parse the bind address '{host}'") from None
    if family == socket.AF_INET:
        return family, (host, port)
    link_local = packed[0] == 0xFE and packed[1] & 0xC0 == 0x80
    if link_local and not address.ifname:
        raise UsageError("Missing interface name for link local address")
    try:
        scope = socket.if_nametoindex(address.ifname) if address.ifname else 0
    except OSError:
        reason = f"Could not convert interface name '{address.ifname}' to index"
        raise UsageError(f"{reason}: No such device") from None
    return family, (host, port, 0, scope)


def _listening(sock: socket.socket) -> socket.socket:
    sock.listen(_BACKLOG)
    sock.setblocking(False)
    _prepare_network(sock)
    return sock
