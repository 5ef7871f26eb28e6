"""Manufactured TPMs that nobody has yet, so that who wants one need not wait for its keys.

They are in memory alone, and each leaves the pool before anything else happens to it: it is handed
out once, or lost with this process. What is made before it is asked for names no owner and no name,
but its certificates name the id that its TPM will have.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections import deque
from typing import TYPE_CHECKING, Final

import trio

from vtpm_cuse.errors import UsageError, VtpmError
from vtpm_cuse.faults import sentence
from vtpm_cuse.fleet.manager.making import Made, manufacture
from vtpm_cuse.fleet.manager.threads import in_thread
from vtpm_cuse.manufacture.files import deciding_files

if TYPE_CHECKING:
    from vtpm_cuse.fleet.states.catalogue import Catalogue

log = logging.getLogger(__name__)

POOL: Final = 2
"""How many wait where nobody says it, once somebody has wanted one."""
_Stamp = tuple[tuple[str, int, int, int], ...]
"""Of each file that decides what is made: path, device's number, time in ns, size."""


class Pool:
    """Makes them, one after the other, when nobody else needs the processor.

    Args:
        catalogue: Where they have a folder while they are made.
        nursery: Where they are made.
        most: How many wait; None for the default, and none before the first is wanted.
    """

    def __init__(self, catalogue: Catalogue, nursery: trio.Nursery, most: int | None) -> None:
        self._catalogue, self._nursery = catalogue, nursery
        self._most = POOL if most is None else most
        self._at_once = trio.CapacityLimiter(os.cpu_count() or 1)
        self._made: deque[Made] = deque()
        self._stamp: _Stamp = ()
        self._filling = False
        if most is not None:
            self._fill()

    @property
    def waiting(self) -> int:
        """How many there are."""
        return len(self._made)

    async def take(self, profile: str | None) -> Made:
        """One that nobody else gets; of another than the configuration's *profile*, a new one.

        Raises:
            VtpmError: None can be made.
            OSError: The same.
        """
        made = None
        if profile is None:
            await self._renew()
            made = self._made.popleft() if self._made else None
        try:
            if made is None:
                async with self._at_once:
                    made = await self._make(profile, patient=False)
        finally:
            self._fill()
        return made

    async def _renew(self) -> None:
        """Forgets those that were made by another configuration, or of another CA."""
        stamp = await in_thread(_stamp)
        if stamp != self._stamp:
            self._stamp = stamp
            self._made.clear()

    async def _make(self, profile: str | None, *, patient: bool) -> Made:
        number = str(uuid.uuid4())
        try:
            folder = self._catalogue.begin(number)
            return await manufacture(folder, number, profile, patient=patient)
        finally:
            self._catalogue.give_up(number)

    def _fill(self) -> None:
        if not self._filling and len(self._made) < self._most:
            self._filling = True
            self._nursery.start_soon(self._fill_up)

    async def _fill_up(self) -> None:
        try:
            while len(self._made) < self._most:
                await self._renew()  # before it is made: a later change is found when it is taken
                self._made.append(await self._make(None, patient=True))
        except (VtpmError, OSError) as exc:  # who wants one makes it, and hears of it
            log.error("No TPM can be manufactured ahead of time: %s", sentence(exc))
        finally:
            self._filling = False


def _stamp() -> _Stamp:
    found = []
    try:
        paths = deciding_files()
    except UsageError:  # the set-up says it
        return ()
    for path in paths:
        try:
            there = os.stat(path)
        except OSError:
            continue
        found.append((path, there.st_ino, there.st_mtime_ns, there.st_size))
    return tuple(found)
