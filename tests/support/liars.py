"""One TPM of a manager whose workers are played by a test, which may lie."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any, Final, cast

import trio

from tests.support.fleet import LAZY, UID, Puppet
from tests.support.waiting import PATIENCE_SECONDS
from vtpm_cuse.fleet.manager.machine import Machine
from vtpm_cuse.fleet.manager.sleepers import Sleepers
from vtpm_cuse.fleet.manager.surroundings import Surroundings
from vtpm_cuse.fleet.manager.volatile import FirstStarts
from vtpm_cuse.fleet.messages import Answer, Call, Message, Report
from vtpm_cuse.fleet.states.catalogue import Catalogue, Entry
from vtpm_cuse.fleet.states.vault import Vault
from vtpm_cuse.wire.blob import BlobFlag, BlobTag, tlv, with_header
from vtpm_cuse.wire.metrics import Histogram

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from vtpm_cuse.fleet.manager.workers import Workers

PERMALL: Final = b"\0\0\xab\x36\x47\x23" + bytes(100)
BLOB: Final = with_header(BlobFlag(0), tlv(BlobTag.DATA, PERMALL))
ENTRY: Final = Entry("6c1dd2ba-9d67-4fb1-8f4c-9a5a35d6e9f4", UID, None, False, (("a", "b"),))


def asked(vault: Vault, call: Call, body: bytes = b"", number: int = 0) -> Message:
    """What a worker gets for that."""
    return vault.answer_untrusted(Message(call, body, number=number))


@contextlib.contextmanager
def catalogue_of_two(folder: Path) -> Iterator[Catalogue]:
    """With two TPMs, one and two."""
    found = Catalogue(str(folder))
    for name in ("one", "two"):
        vault = Vault(found.begin(ENTRY.id), may_begin=True)
        assert asked(vault, Call.STORE, BLOB).kind is Answer.DONE
        vault.close()
        found.finish(name, ENTRY)
    yield found
    found.close()


def everything(folder: str) -> dict[str, bytes]:
    """All files, by their paths."""
    found = {}
    for path, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(path, name), "rb") as file:
                found[os.path.join(path, name)] = file.read()
    return found


class Stage:
    """A machine whose workers are puppets."""

    def __init__(self, catalogue: Catalogue, run: Path, nursery: trio.Nursery) -> None:
        self.puppets: list[Puppet] = []
        self.refills = 0
        self.sleepers: Sleepers[Machine] = Sleepers()
        self.one = Machine(
            "one",
            ENTRY,
            Surroundings(
                *(catalogue, cast("Workers", self), self.sleepers, nursery, str(run), LAZY),
                lambda _: None,
                *(Histogram(), FirstStarts()),
            ),
        )

    async def take(self) -> object:
        """As `Workers` does."""
        await trio.lowlevel.checkpoint()
        self.puppets.append(Puppet())
        return self.puppets[-1].worker

    def refill(self) -> None:
        """As `Workers` does."""
        self.refills += 1

    async def started(self, begin: Callable[[], object]) -> Puppet:
        """What the next puppet is told; it says that it serves."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(begin)  # type: ignore[arg-type]
            count = len(self.puppets)
            while len(self.puppets) == count:
                await trio.lowlevel.checkpoint()
            puppet = self.puppets[-1]
            told = await puppet.orders.receive()
            assert told is not None
            puppet.told = told
            assert self.refills == count  # another one takes a processor from this one
            await puppet.orders.send(Message(Report.SERVING))
        assert self.refills == len(self.puppets)
        return puppet


@contextlib.asynccontextmanager
# Any: its state changes, which mypy does not see.
async def stage_of(catalogue: Catalogue, run: Path) -> AsyncIterator[Any]:
    """TPM one of that catalogue."""
    with trio.fail_after(PATIENCE_SECONDS):
        async with trio.open_nursery() as nursery:
            stage = Stage(catalogue, run, nursery)
            try:
                yield stage
            finally:
                nursery.cancel_scope.cancel()
        for puppet in stage.puppets:
            puppet.end()
        stage.one._power_off()
        stage.sleepers.close()
