"""The life of a manager's process: from its folders to the end of all its TPMs."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import resource
import socket
from typing import TYPE_CHECKING, Final, NamedTuple

import trio

from vtpm_cuse import faults
from vtpm_cuse.acquire import activation
from vtpm_cuse.acquire.endpoints import Endpoints
from vtpm_cuse.acquire.sockets import listen
from vtpm_cuse.config import SocketAddress
from vtpm_cuse.errors import FrontendError, VtpmError
from vtpm_cuse.fleet import heritage
from vtpm_cuse.fleet.manager import api, confinement, exporter
from vtpm_cuse.fleet.manager.deposits import Deposits
from vtpm_cuse.fleet.manager.machine import FOLDER
from vtpm_cuse.fleet.manager.manager import SOCKET, managed
from vtpm_cuse.fleet.opener import Opener
from vtpm_cuse.fleet.states.catalogue import Catalogue
from vtpm_cuse.service.confine import secrecy
from vtpm_cuse.service.process.signals import ending_signals, renewing_signal
from vtpm_cuse.wire import metrics

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from vtpm_cuse.fleet.heritage import Heritage, SavedOpener
    from vtpm_cuse.fleet.manager.manager import Manager, Settings
    from vtpm_cuse.service.process.held import HeldSignals
    from vtpm_cuse.service.process.notify import ServiceManager

log = logging.getLogger(__name__)

METRICS: Final = "metrics"
"""In the folder of the sockets."""
_OWN: Final = 0o600
_OWN_AND_GROUP: Final = 0o660


def run(settings: Settings, service: ServiceManager, held: HeldSignals) -> int:
    """Manages TPMs until it is told to end; returns the exit status.

    SIGUSR2 has the program begin anew, with all that it has: what is installed by then is run.
    """
    # Before there is anything for it to see.
    mounts = os.path.join(os.path.abspath(settings.run), FOLDER)
    opener = None if heritage.is_there() else Opener(mounts, own=settings.own)
    secrecy.hide_process()  # it has the volatile states of all that sleep
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # five and more for each TPM
    status = 0
    try:
        if not heritage.is_there():  # what this process has taken the place of was in it
            confinement.enter(settings)
        left = heritage.taken()
        while True:
            deposits = _deposits(settings, service, left)
            if left is None and deposits is not None:
                left = deposits.left
            theirs = left and left.manager.opener
            if opener is not None and theirs is not None:
                opener = Opener.behind(theirs, opener)
            with opener or Opener(mounts, own=settings.own, left=theirs) as used:
                # Root's does not outlive it: what that makes stays, and needs nobody to end it.
                kept = used.shared() if settings.own and deposits is not None else None
                left = trio.run(_live, settings, service, held, used, kept, left, deposits)
            if left is None:
                break
            opener = None
            try:
                heritage.bequeath(left, service.hand_on())
            except OSError as refused:
                reason = faults.sentence(refused)
                log.error("It cannot begin anew, and goes on as it is: %s", reason)
    except* (VtpmError, OSError) as group:
        for exc in _leaves(group):
            log.error("%s", faults.sentence(exc))
        status = 1
    return status


def _deposits(
    settings: Settings, service: ServiceManager, left: Heritage | None
) -> Deposits | None:
    """What outlives this manager, where somebody keeps it. Raises UsageError, ChannelError, OSError."""
    if not service.keeps:
        return None
    fd = activation.passed_sockets(activation.MANAGERS).get("depot")
    if left is not None:
        fd = left.manager.depot
    line = None
    if fd is not None:
        os.set_inheritable(fd, False)
        line = socket.socket(fileno=fd)
    found = Deposits(service, line, tell=left is None)
    if found.left is not None and not Catalogue.is_of(settings.state, found.left.manager.lock):
        log.error("TPMs that were on are off, for they are not in %s", settings.state)
        found.clear()
    return found


def _leaves(group: BaseExceptionGroup[Exception]) -> list[Exception]:
    found: list[Exception] = []
    for exc in group.exceptions:
        found += _leaves(exc) if isinstance(exc, BaseExceptionGroup) else [exc]
    return found


async def _live(
    settings: Settings,
    service: ServiceManager,
    held: HeldSignals,
    opener: Opener,
    kept: SavedOpener | None,
    left: Heritage | None,
    deposits: Deposits | None,
) -> Heritage | None:
    """Until the end, or until there is something to be left to the next program."""
    scope = trio.CancelScope()
    wish, wishes = trio.open_memory_channel[None](1)

    def begin_anew() -> None:
        with contextlib.suppress(trio.WouldBlock):
            wish.send_nowait(None)

    renewed = False

    async def renew(manager: Manager) -> None:
        """Stops serving once what is installed now is known to start."""
        nonlocal renewed
        async for _ in wishes:
            try:
                await manager.workers.renew()
            except (VtpmError, OSError) as exc:
                log.error("It does not begin anew: %s", faults.sentence(exc))
                service.ready(in_background=False)  # who has asked for it waits
                continue
            renewed = True
            scope.cancel()

    with ending_signals(scope.cancel, held.release) as came, renewing_signal(begin_anew):
        async with managed(settings, opener, left, deposits) as manager:
            with _asked(settings, left) as place:
                if settings.own:
                    await _end_others(manager, opener)
                manager.keep(place.socket.fileno(), kept, own_path=place.own_path)
                with scope, _metrics(settings) as monitored:
                    log.info("TPMs are in %s, their sockets in %s.", settings.state, settings.run)
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(renew, manager)
                        _export(manager, settings, monitored.listener(), nursery)
                        service.ready(in_background=False)
                        await api.serve(manager, place.listener())
                held.hold()
                if renewed and not came:
                    place.endpoints.give_up_paths()
                    listener = place.socket.detach()
                    found = await manager.leave(listener, own_path=place.own_path)
                    depot = None if deposits is None else deposits.leave()
                    saved = found.manager._replace(opener=opener.leave(), depot=depot)
                    return found._replace(manager=saved)
                if deposits is not None:
                    place.endpoints.give_up_paths()
                held.release()
            service.stopping()
    return None


async def _end_others(manager: Manager, opener: Opener) -> None:
    """All mounts of TPMs that are off, which a dead manager has left."""
    on = {tpm.name for tpm in await manager.list() if tpm.state != "stopped"}
    try:
        await opener.end_others(on)
    except FrontendError as exc:
        log.error("What a dead manager has mounted may be there: %s", exc)


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


class _Place(NamedTuple):
    """Where somebody is listened to."""

    endpoints: Endpoints
    socket: socket.socket
    own_path: bool

    def listener(self) -> trio.SocketListener:
        """For who serves it, and closes his own descriptor of it."""
        return trio.SocketListener(trio.socket.from_stdlib_socket(self.socket.dup()))


@contextlib.contextmanager
def _asked(settings: Settings, left: Heritage | None) -> Iterator[_Place]:
    """Where it is asked: by its own user, and by the members of a group. Raises UsageError.

    Who has started it may have opened this, for whom he likes; then the path stays, too.
    """
    passed = activation.passed_sockets(activation.MANAGERS).get("manager")
    mode = _OWN if settings.group is None else _OWN_AND_GROUP
    address = SocketAddress("unixio", fd=passed, path=SOCKET, mode=mode, gid=settings.group)
    if left is not None:
        address = address._replace(fd=left.manager.listener)
        if passed is not None:  # the same once more
            os.close(passed)
    with _listening(settings, address) as place:
        if left is not None and left.manager.own_path:
            place.endpoints.own(os.path.join(os.path.abspath(settings.run), SOCKET))
            place = place._replace(own_path=True)
        yield place


def _metrics(settings: Settings) -> AbstractContextManager[_Place]:
    """Where monitoring asks: by its own user alone, who sees all TPMs. Raises UsageError."""
    return _listening(settings, SocketAddress("unixio", path=METRICS, mode=_OWN))


@contextlib.contextmanager
def _listening(settings: Settings, address: SocketAddress) -> Iterator[_Place]:
    """On a path in the folder of the sockets, or on what was passed. Raises UsageError."""
    path = os.path.join(os.path.abspath(settings.run), address.path or "")
    with contextlib.closing(Endpoints()) as endpoints:
        own = endpoints.control_listener = listen(endpoints, address._replace(path=path))
        yield _Place(endpoints, own, own_path=address.fd is None)
