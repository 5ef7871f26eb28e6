"""TPMs that nobody has yet, so that who wants one need not wait until it is made.

They are in memory alone, and each leaves the pool before anything else happens to it: it is handed
out once, or lost with this process. What is made before it is asked for names no owner and no name,
but certificates name the id that their TPM will have.
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
from vtpm_cuse.fleet.manager.making import Made, make, manufacture
from vtpm_cuse.fleet.manager.threads import in_thread
from vtpm_cuse.manufacture.files import deciding_files

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from vtpm_cuse.fleet.manager.workers import Workers
    from vtpm_cuse.fleet.states.catalogue import Catalogue

log = logging.getLogger(__name__)

POOL: Final = 2
"""How many wait where nobody says it, once somebody has wanted one."""
_PAUSE_SECONDS: Final = 0.02
"""In which a TPM is named and powered on."""
_Stamp = tuple[tuple[str, int, int, int], ...]
"""Of each file that decides what is made: path, device's number, time in ns, size."""


class _Ahead:
    """Those that wait, and who makes more.

    Args:
        nursery: Where they are made, one after the other.
        most: How many wait.
        make: Makes one.
        what: They are, for the log.
        pause: Seconds before it begins: who has just taken one needs the processor himself.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        most: int,
        make: Callable[[], Awaitable[Made]],
        what: str,
        pause: float = 0.0,
    ) -> None:
        self._nursery, self._most, self._make = nursery, most, make
        self._what, self._pause = what, pause
        self._made: deque[Made] = deque()
        self._filling = False

    def __len__(self) -> int:
        return len(self._made)

    def take(self) -> Made | None:
        """One that nobody else gets, if there is one."""
        return self._made.popleft() if self._made else None

    def forget(self) -> None:
        """Nobody gets those."""
        self._made.clear()

    def fill(self) -> None:
        """Has as many made as are to wait."""
        if not self._filling and len(self._made) < self._most:
            self._filling = True
            self._nursery.start_soon(self._fill_up)

    async def _fill_up(self) -> None:
        try:
            await trio.sleep(self._pause)
            while len(self._made) < self._most:
                self._made.append(await self._make())
        except (VtpmError, OSError) as exc:  # who wants one makes it, and hears of it
            log.error("No TPM can be %s ahead of time: %s", self._what, sentence(exc))
        finally:
            self._filling = False


class PlainPool:
    """TPMs as libtpms makes them, by a worker; they have been powered on, which takes the longest.

    Args:
        workers: Of which each makes one, and ends.
        nursery: Where they are made, but none before the first is wanted.
    """

    def __init__(self, workers: Workers, nursery: trio.Nursery) -> None:
        self._workers = workers
        self._ahead = _Ahead(nursery, POOL, self._make, "made", _PAUSE_SECONDS)

    @property
    def waiting(self) -> int:
        """How many there are."""
        return len(self._ahead)

    async def take(self, profile: str | None) -> Made:
        """One that nobody else gets; of another *profile* than libtpms' own, a new one.

        Raises:
            VtpmError: None can be made.
            OSError: The same.
        """
        try:
            made = None if profile is not None else self._ahead.take()
            return made or await self._make(profile)
        finally:
            self._ahead.fill()

    async def _make(self, profile: str | None = None) -> Made:
        return await make(self._workers, str(uuid.uuid4()), profile)


class Pool:
    """Manufactured ones: made one after the other, when nobody else needs the processor.

    Args:
        catalogue: Where they have a folder while they are made.
        nursery: Where they are made.
        most: How many wait; None for the default, and none before the first is wanted.
    """

    def __init__(self, catalogue: Catalogue, nursery: trio.Nursery, most: int | None) -> None:
        self._catalogue = catalogue
        self._at_once = trio.CapacityLimiter(os.cpu_count() or 1)
        self._ahead = _Ahead(
            nursery, POOL if most is None else most, self._make_patiently, "manufactured"
        )
        self._stamp: _Stamp = ()
        if most is not None:
            self._ahead.fill()

    @property
    def waiting(self) -> int:
        """How many there are."""
        return len(self._ahead)

    async def take(self, profile: str | None) -> Made:
        """One that nobody else gets; of another than the configuration's *profile*, a new one.

        Raises:
            VtpmError: None can be made.
            OSError: The same.
        """
        made = None
        if profile is None:
            await self._renew()
            made = self._ahead.take()
        try:
            if made is None:
                async with self._at_once:
                    made = await self._make(profile, patient=False)
        finally:
            self._ahead.fill()
        return made

    async def _renew(self) -> None:
        """Forgets those that were made by another configuration, or of another CA."""
        stamp = await in_thread(_stamp)
        if stamp != self._stamp:
            self._stamp = stamp
            self._ahead.forget()

    async def _make(self, profile: str | None, *, patient: bool) -> Made:
        number = str(uuid.uuid4())
        try:
            folder = self._catalogue.begin(number)
            return await manufacture(folder, number, profile, patient=patient)
        finally:
            self._catalogue.give_up(number)

    async def _make_patiently(self) -> Made:
        await self._renew()  # before it is made: a later change is found when it is taken
        return await self._make(None, patient=True)


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
