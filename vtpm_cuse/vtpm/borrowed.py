"""A TPM that is not ours, a chip's say: what is known of it, and how its clients are managed."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Final, NamedTuple

from vtpm_cuse.resmgr.shared import SharedManager

if TYPE_CHECKING:
    from collections.abc import Callable

    from vtpm_cuse.resmgr.quota import Limits
    from vtpm_cuse.vtpm.vtpm import Vtpm

    Rests = tuple[tuple[float, Callable[[], None]], ...]

log = logging.getLogger(__name__)

_SLOTS_BELOW: Final = 3
"""Objects, and sessions, that the kernel's resource manager lets one descriptor have."""
_PAUSE_SECONDS: Final = 1.0
_LONG_PAUSE_SECONDS: Final = 60.0


class Borrowed(NamedTuple):
    """What is known of it.

    Attributes:
        flush_all: What others have left in it is ended at the start.
        below_manager: It is reached through a resource manager, as by the kernel's /dev/tpmrmN.
    """

    flush_all: bool = False
    below_manager: bool = False


def manager_of(vtpm: Vtpm, borrowed: Borrowed, limits: Limits) -> SharedManager:
    """The manager of its clients."""
    slots = _SLOTS_BELOW if borrowed.below_manager else 0
    manager = SharedManager(
        vtpm, inner=vtpm.manage, limits=limits, alone=borrowed.flush_all, slots=slots
    )
    manager.on_gap = _say_gap
    return manager


def _say_gap(handles: list[int]) -> None:
    log.warning(
        "The TPM saves no more sessions before the oldest is used or ended, one of these, which "
        "others have saved: %s; --flush-all at the start ends them",
        ", ".join(f"0x{handle:08x}" for handle in handles),
    )


def begin(manager: SharedManager) -> None:
    """Has the manager learn what the TPM is like, and says what others have left in it."""
    if manager.prepare() and any(manager.found):
        log.info(
            "The TPM holds %d objects and %d sessions of others; --flush-all at the start ends them",
            *manager.found,
        )


def rests_of(manager: SharedManager, borrowed: Borrowed) -> Rests:
    """What is to be done in pauses, each so many seconds after the one before it.

    The TPM itself has a few slots for all that use it, so objects leave them soon. A session that is
    saved grows old with each other that is saved, so sessions stay longer. A manager below swaps all
    that is loaded at every command, so nothing stays.
    """
    if borrowed.below_manager:
        return ((0.0, functools.partial(manager.rest, sessions=True)),)
    return (
        (_PAUSE_SECONDS, functools.partial(manager.rest, sessions=False)),
        (_LONG_PAUSE_SECONDS, functools.partial(manager.rest, sessions=True)),
    )
