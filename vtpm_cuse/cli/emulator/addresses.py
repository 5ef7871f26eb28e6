"""From a command line to the addresses of channels: where clients connect, or are connected already."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from vtpm_cuse.cli.words.numbers import FD_MAX, number
from vtpm_cuse.config import SocketAddress
from vtpm_cuse.errors import UsageError
from vtpm_cuse.storage.locations import absolute_path

if TYPE_CHECKING:
    from vtpm_cuse.cli.words.commandline import CommandLine
    from vtpm_cuse.cli.words.suboptions import SubValues
    from vtpm_cuse.config import VtpmConfig

_PORT_MAX: Final = 0xFFFF
_FIRST_FD: Final = 3
_SOCKET_MODE: Final = 0o770


def data_channel(line: CommandLine) -> tuple[SocketAddress | None, bool]:
    """Where TPM commands come from, and whether each response ends its connection.

    ``--port`` is a short form of ``--server``: the last of the two counts, and then ``--fd``.
    """
    port = line.number("port", _PORT_MAX) if line.has("port") else None
    fd = data_fd(line, "Cannot parse socket file descriptor.") if line.has("fd") else None
    server = line.subs("server")
    last = line.last_of("server", "port")
    if last == "server" and server is not None:
        return _server_address(line, server, port), server.flag("disconnect")
    if last == "port":
        return SocketAddress("tcp", port=port), True
    return (None if fd is None else SocketAddress("tcp", fd=fd)), False


def data_fd(line: CommandLine, unreadable: str) -> int:
    """``--fd``, where *unreadable* is said of no number. Raises UsageError."""
    fd = number(line.value("fd") or "", 0, FD_MAX, base=10)
    if fd is None:
        raise line.error(unreadable)
    if fd < _FIRST_FD:
        raise line.error("Error: Cannot accept file descriptors with values 0, 1, or 2")
    return fd


def _server_address(line: CommandLine, given: SubValues, port: int | None) -> SocketAddress:
    address = _address(line, given, given.text("type") or "tcp")
    if address.kind == "tcp" and address.port is None and address.fd is None:
        port = port if port is not None else number(os.environ.get("TPM_PORT", ""), 0, _PORT_MAX)
        if port is None:
            raise line.error("TPM_PORT is not set or contains an invalid integer value.")
        return address._replace(port=port)
    if address.kind == "unixio" and address.path is None and address.fd is None:
        raise line.error("Missing path and file descriptor option for UnixIO socket")
    return address


def passed(line: CommandLine, name: str, given: SocketAddress | None) -> SocketAddress | None:
    """The channel on the socket of this name that a service manager passed, else *given*."""
    if "LISTEN_FDS" not in os.environ:
        return given
    from vtpm_cuse.acquire.activation import passed_sockets

    fd = passed_sockets(taken=line.descriptors()).get(name)
    if fd is None:
        return given
    if given is not None:
        raise UsageError(f"The {name} channel is both an option and a socket of LISTEN_FDS")
    return SocketAddress("unixio", fd=fd)


def control_channel(line: CommandLine) -> tuple[SocketAddress | None, bool]:
    """Where control commands come from, and whether the end of that is the end of all."""
    given = line.subs("ctrl")
    if given is None:
        return None, False
    return _listening_address(line, given, "control"), given.flag("terminate")


def managed_channel(line: CommandLine, vtpm: VtpmConfig) -> SocketAddress | None:
    """Where clients of the resource manager connect."""
    given = line.subs("managed")
    address = None
    if given is not None:
        address = _listening_address(line, given, "managed")
        address = address._replace(per_process=given.flag("per-process"))
        if address.per_process and address.kind != "unixio":
            raise line.error("Error: per-process is for type=unixio: TCP names no process")
    address = passed(line, "managed", address)
    if address is not None and not vtpm.tpm2:
        raise line.error("Error: The resource manager is for a TPM 2.0: give --tpm2")
    return address


def _listening_address(line: CommandLine, given: SubValues, channel: str) -> SocketAddress:
    kind = given.text("type")
    if kind is None:
        raise line.error(f"Missing type parameter for {channel} channel")
    address = _address(line, given, kind)
    if address.kind == "tcp" and address.port is None and address.fd is None:
        raise line.error(f"Missing port and fd options for TCP {channel} channel")
    unix = (address.fd, address.clientfd, address.path)
    if address.kind == "unixio" and unix == (None, None, None):
        raise line.error(f"Missing path and fd options for UnixIO {channel} channel")
    return address


def _address(line: CommandLine, given: SubValues, kind: str) -> SocketAddress:
    port, path = given.integer("port"), given.text("path")
    if port is not None and not 0 <= port <= _PORT_MAX:
        raise line.error(f"TCP port {port} is not from 0 to {_PORT_MAX}")
    unix = kind == "unixio"
    mode = given.integer("mode")
    return SocketAddress(
        kind="unixio" if unix else "tcp",
        port=None if unix else port,
        bindaddr=given.text("bindaddr") or "127.0.0.1",
        ifname=given.text("ifname"),
        path=absolute_path(path) if unix and path is not None else None,
        mode=_SOCKET_MODE if mode is None else mode,
        uid=given.integer("uid"),
        gid=given.integer("gid"),
        fd=descriptor(given.integer("fd")),
        clientfd=descriptor(given.integer("clientfd")) if unix else None,
    )


def descriptor(number_given: int | None) -> int | None:
    """PEER: a negative number is none."""
    return None if number_given is None or number_given < 0 else number_given
