"""What all TPMs of a manager share."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from vtpm_cuse.errors import FrontendError

if TYPE_CHECKING:
    from collections.abc import Callable

    import trio

    from vtpm_cuse.fleet.base import Interface
    from vtpm_cuse.fleet.manager.deposits import Deposits
    from vtpm_cuse.fleet.manager.machine import Machine
    from vtpm_cuse.fleet.manager.sleepers import Sleepers
    from vtpm_cuse.fleet.manager.volatile import FirstStarts
    from vtpm_cuse.fleet.manager.workers import Workers
    from vtpm_cuse.fleet.opener import MakesDevices
    from vtpm_cuse.fleet.states.catalogue import Catalogue
    from vtpm_cuse.wire.metrics import Histogram


class Surroundings(NamedTuple):
    """Of one manager.

    Attributes:
        run: The folder for sockets.
        idle: Seconds without a command after which a TPM sleeps.
        changed: Called with one that is not as it was.
        wake_times: Of wakes, as seconds.
        first_starts: Of TPMs that were made lately.
        opener: Who makes devices, where that can be done.
        deposits: What outlives the manager, where something does.
    """

    catalogue: Catalogue
    workers: Workers
    sleepers: Sleepers[Machine]
    nursery: trio.Nursery
    run: str
    idle: float
    changed: Callable[[Machine], None]
    wake_times: Histogram
    first_starts: FirstStarts
    opener: MakesDevices | None = None
    deposits: Deposits | None = None

    def need_opener(self, interface: Interface) -> MakesDevices:
        """Who makes such. Raises FrontendError."""
        if self.opener is None or interface not in self.opener.makes:
            whose = "A user's own manager" if interface == "fuse" else "Root's manager"
            raise FrontendError(f"{whose} alone has TPMs with --interface {interface}")
        return self.opener
