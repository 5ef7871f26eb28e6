"""The life of a manager's process: from its folders to the end of all its TPMs."""

from __future__ import annotations

import logging
import resource
from typing import TYPE_CHECKING

import trio

from vtpm_cuse import faults
from vtpm_cuse.errors import VtpmError
from vtpm_cuse.fleet.manager import managed
from vtpm_cuse.service.process.signals import ending_signals

if TYPE_CHECKING:
    from vtpm_cuse.fleet.manager import Settings
    from vtpm_cuse.service.process.held import HeldSignals
    from vtpm_cuse.service.process.notify import ServiceManager

log = logging.getLogger(__name__)


def run(settings: Settings, service: ServiceManager, held: HeldSignals) -> int:
    """Manages TPMs until it is told to end; returns the exit status."""
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
        async with managed(settings):
            with scope:
                log.info("TPMs are in %s, and their sockets in %s.", settings.state, settings.run)
                service.ready()
                await trio.sleep_forever()
            service.stopping()
