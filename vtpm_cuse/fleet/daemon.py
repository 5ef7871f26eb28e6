"""The life of a manager's process: from its folders to the end of all its TPMs."""

from __future__ import annotations

import contextlib
import functools
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
from vtpm_cuse.fleet import api, exporter
from vtpm_cuse.fleet.manager import managed
from vtpm_cuse.fleet.opener import Opener
from vtpm_cuse.service.confine import secrecy
from vtpm_cuse.service.process.signals import ending_signals
from vtpm_cuse.wire import metrics

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from vtpm_cuse.fleet.manager import Manager, Settings
    from vtpm_cuse.service.process.held import HeldSignals
    from vtpm_cuse.service.process.notify import ServiceManager

log = logging.getLogger(__name__)

SOCKET: Final = "manager.sock"
METRICS: Final = "metrics"
"""In the folder of the sockets."""
_OWN: Final = 0o600
_OWN_AND_GROUP: Final = 0o660


def run(settings: Settings, service: ServiceManager, held: HeldSignals) -> int:
    """Manages TPMs until it is told to end; returns the exit status."""
    opener = Opener("fuse" if settings.own else "cuse")  # before there is anything for it to see
    secrecy.hide_process()  # it has the volatile states of all that sleep
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # five and more for each TPM
    status = 0
    try:
        with opener:
            trio.run(_live, settings, service, held, opener)
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


async def _live(
    settings: Settings, service: ServiceManager, held: HeldSignals, opener: Opener
) -> None:
    scope = trio.CancelScope()
    with ending_signals(scope.cancel, held.release):
        async with managed(settings, opener) as manager:
            with scope, _listener(settings) as listener, _metrics(settings) as monitored:
                log.info("TPMs are in %s, and their sockets in %s.", settings.state, settings.run)
                async with trio.open_nursery() as nursery:
                    _export(manager, settings, monitored, nursery)
                    service.ready(in_background=False)
                    await api.serve(manager, listener)
            service.stopping()


def _export(
    manager: Manager, settings: Settings, listener: trio.SocketListener, nursery: trio.Nursery
) -> None:
    """What its TPMs do is told from now on."""

    async def text(*, openmetrics: bool = True) -> str:
        tpms = [api.as_told(tpm) for tpm in await manager.list()]
        return metrics.text(tpms, manager.wake_times, openmetrics=openmetrics)

    nursery.start_soon(exporter.serve, text, listener)
    if settings.metrics_file is not None:
        older = functools.partial(text, openmetrics=False)
        nursery.start_soon(exporter.keep_file, older, settings.metrics_file)


@contextlib.contextmanager
def _listener(settings: Settings) -> Iterator[trio.SocketListener]:
    """Where it is asked: by its own user, and by the members of a group. Raises UsageError.

    Who has started it may have opened this, for whom he likes; then the path stays, too.
    """
    passed = activation.passed_sockets(activation.MANAGERS).get("manager")
    mode = _OWN if settings.group is None else _OWN_AND_GROUP
    address = SocketAddress("unixio", fd=passed, path=SOCKET, mode=mode, gid=settings.group)
    with _listening(settings, address) as listener:
        yield listener


def _metrics(settings: Settings) -> AbstractContextManager[trio.SocketListener]:
    """Where monitoring asks: by its own user alone, who sees all TPMs. Raises UsageError."""
    return _listening(settings, SocketAddress("unixio", path=METRICS, mode=_OWN))


@contextlib.contextmanager
def _listening(settings: Settings, address: SocketAddress) -> Iterator[trio.SocketListener]:
    """On a path in the folder of the sockets, or on what was passed. Raises UsageError."""
    path = os.path.join(os.path.abspath(settings.run), address.path or "")
    with contextlib.closing(Endpoints()) as endpoints:
        sock = listen(endpoints, address._replace(path=path))
        yield trio.SocketListener(trio.socket.from_stdlib_socket(sock))
