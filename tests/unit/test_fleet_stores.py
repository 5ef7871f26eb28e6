"""What a TPM that is awake stores: each step of that fails once, or is the last of its process.

A write that was acknowledged is there afterwards; one that was not is there whole, or not at all.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import tempfile
from typing import TYPE_CHECKING, Any

import pytest

from tests.support import commands as tpm
from tests.support.fleet import Client, fleet, in_trio, started, until
from tests.support.tree import Tree, written
from vtpm_cuse.fleet.states.vault import Vault

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from vtpm_cuse.fleet.manager.manager import Manager

SIZE = 8


@pytest.fixture(autouse=True)
def _no_disk_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Tree` knows what is flushed."""
    for flush in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, flush, lambda _fd: None)


def number_in(answer: bytes) -> int:
    """What a read gave."""
    assert tpm.code_of(answer) == 0, answer.hex()
    return int.from_bytes(tpm.nv_data(answer), "big")


async def with_a_number(manager: Manager) -> Client:
    """The client of TPM one, which has the number 0."""
    client = await Client.of(await started(manager, "one"))
    for command in (tpm.nv_define(tpm.NV_INDEX, SIZE), _written(0)):
        assert tpm.code_of(await client.ask(command)) == 0
    return client


def _written(number: int) -> bytes:
    return tpm.nv_write(tpm.NV_INDEX, number.to_bytes(SIZE, "big"))


@contextlib.contextmanager
def watched(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the manager does there meanwhile is noted."""
    with monkeypatch.context() as patch:
        tree.watch(patch)
        yield


@in_trio
async def test_the_power_goes_at_every_step_of_a_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes: dict[frozenset[Any], dict[str, bytes | None]] = {}
    last: list[dict[str, bytes | None]] = []
    store = Vault._store

    async with fleet(tmp_path) as manager:
        client = await with_a_number(manager)
        folder = manager._catalogue.state_of("one")
        tree, stored = Tree(folder), [_permanent(folder)]

        def cut() -> None:
            for files in tree.after_power_cut():
                outcomes.setdefault(frozenset(files.items()), files)

        def noting(vault: Vault, name: str, blob: bytes) -> None:
            store(vault, name, blob)
            # TPMs are made ahead meanwhile, and a slow one may store its clock, too.
            if vault is manager._machines["one"]._vault and len(stored) == 1:
                stored.append(vault.permanent())
                last.extend(tree.after_power_cut())
                tree.at_step = lambda: None

        tree.at_step = cut
        monkeypatch.setattr(Vault, "_store", noting)
        with watched(tree, monkeypatch):
            assert tpm.code_of(await client.ask(_written(1))) == 0
    before, after = stored
    assert before != after

    def found(files: dict[str, bytes | None]) -> bytes:
        with tempfile.TemporaryDirectory(dir=tmp_path) as place:
            written(files, place)
            return _permanent(place)

    assert set(map(found, outcomes.values())) == {before, after}
    assert set(map(found, last)) == {after}  # which was acknowledged


def _permanent(folder: str) -> bytes:
    vault = Vault(folder)
    try:
        return vault.permanent()
    finally:
        vault.close()


@pytest.mark.parametrize("fault", ["ENOSPC", "EIO", "death"])
@in_trio
async def test_every_step_of_a_store_fails_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    async with fleet(tmp_path) as manager:
        client = await with_a_number(manager)
        known = refused = step = 0
        while True:  # the last time, none fails
            number = step + 1
            tree = Tree(manager._catalogue.state_of("one"))
            if fault == "death":
                tree.at_step = _killing(manager, tree, step)
            else:
                tree.fault, tree.fails = step, OSError(getattr(errno, fault), "so it is")
            with watched(tree, monkeypatch):
                answer = (
                    await client.ask(_written(number))
                    if fault != "death"
                    else await _asked(client, number)
                )
            done = answer != b"" and tpm.code_of(answer) == 0
            refused += not done
            if not done:
                if fault == "death":
                    await until(manager, "one", "failed")
                await manager.reset("one")
                if fault == "death":
                    client = await Client.of(await manager.describe("one"))
            found = number_in(await client.ask(tpm.nv_read(tpm.NV_INDEX, SIZE)))
            assert found == number if done else found in {known, number}, (step, tree.steps)
            known = found
            step += 1
            if step > tree.steps:
                break
        assert done
        assert refused


def _killing(manager: Manager, tree: Tree, step: int) -> Callable[[], object]:
    (machine,) = manager._machines.values()
    pid = machine.described().pid
    assert pid is not None

    def kill() -> None:
        if tree.steps == step:
            os.kill(pid, signal.SIGKILL)

    return kill


async def _asked(client: Client, number: int) -> bytes:
    """Nothing where nobody answers any more."""
    with contextlib.suppress(OSError):
        return await client.ask(_written(number))
    return b""
