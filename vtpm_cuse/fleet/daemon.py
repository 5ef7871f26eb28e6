"""The life of a manager's process: from its folders to the end of all its TPMs."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
from typing import TYPE_CHECKING, Final

import trio

from vtpm_cuse import faults
from vtpm_cuse.acquire import activation
from vtpm_cuse.acquire.endpoints import Endpoints
from vtpm_cuse.acquire.sockets import listen
from vtpm_cuse.config import SocketAddress
from vtpm_cuse.errors import VtpmError
from vtpm_cuse.fleet import api
from vtpm_cuse.fleet.manager import managed
from vtpm_cuse.service.confine import secrecy
from vtpm_cuse.service.process.signals import ending_signals

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vtpm_cuse.fleet.manager import Settings
    from vtpm_cuse.service.process.held import HeldSignals
    from vtpm_cuse.service.process.notify import ServiceManager

log = logging.getLogger(__name__)

SOCKET: Final = "manager.sock"
"""In the folder of the sockets."""
_OWN: Final = 0o600
_OWN_AND_GROUP: Final = 0o660


def run(settings: Settings, service: ServiceManager, held: HeldSignals) -> int:
    """Manages TPMs until it is told to end; returns the exit status."""
    secrecy.hide_process()  # it has the volatile states of all that sleep
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # five and more for each TPM
    status = 0
    try:
        trio.run(_live, settings, service, held)
    except* (VtpmError, OSError) as group:
        for exc in _leaves(group):
            log.error("%s", faults.sentence(exc))
        status = 1
    return status


def _leaves(group: BaseExceptionGroup[Exception]) -> list[Exception]:
    found: list[Exception] = []
    for exc in group.exceptions:
        found += _leaves(exc) if isinstance(exc, BaseExceptionGroup) else [exc]
    return found


async def _live(settings: Settings, service: ServiceManager, held: HeldSignals) -> None:
    scope = trio.CancelScope()
    with ending_signals(scope.cancel, held.release):
        async with managed(settings) as manager:
            with scope, _listener(settings) as listener:
                log.info("TPMs are in %s, and their sockets in %s.", settings.state, settings.run)
                service.ready(in_background=False)
                await api.serve(manager, listener)
            service.stopping()


@contextlib.contextmanager
def _listener(settings: Settings) -> Iterator[trio.SocketListener]:
    """Where it is asked: by its own user, and by the members of a group. Raises UsageError.

    Who has started it may have opened this, for whom he likes; then the path stays, too.
    """
    passed = activation.passed_sockets(activation.MANAGERS).get("manager")
    path = os.path.join(os.path.abspath(settings.run), SOCKET)
    mode = _OWN if settings.group is None else _OWN_AND_GROUP
    endpoints = Endpoints()
    with contextlib.closing(endpoints):
        address = SocketAddress("unixio", fd=passed, path=path, mode=mode, gid=settings.group)
        yield trio.SocketListener(trio.socket.from_stdlib_socket(listen(endpoints, address)))
