"""Every step of a replacement fails, or the process dies there: the old or the new state is whole."""

from __future__ import annotations

import errno
import os
import types
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.files import open_descriptors
from vtpm_cuse import files
from vtpm_cuse.errors import StateMissing, StorageError
from vtpm_cuse.storage import directory
from vtpm_cuse.storage.directory import DirectoryStore

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

OLD, NEW = b"old" * 1000, b"new" * 5000
_SILENT = {"path", "fspath", "stat_result"}


class Steps:
    """Counts the module's system calls and lets one of them go wrong.

    Args:
        at: Which call, from 0; None lets all pass.
        dies: The process ends there instead of an error; a write is cut in half before.
    """

    def __init__(self, at: int | None, *, dies: bool) -> None:
        self._at, self._dies = at, dies
        self.trace: list[str] = []

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever os has
        real = getattr(os, name)
        if not isinstance(real, types.BuiltinFunctionType) or name in _SILENT:
            return real

        def call(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            return self.step(name, lambda: real(*args, **kwargs), args)

        return call

    def step(self, name: str, real: Callable[[], Any], args: tuple[Any, ...] = ()) -> Any:  # noqa: ANN401
        number = len(self.trace)
        self.trace.append(name)
        if number != self._at:
            return real()
        if name == "write":
            os.write(args[0], args[1][: len(args[1]) // 2])
        if self._dies:
            os._exit(77)
        if name == "close":
            real()  # the kernel closes it whatever it says
        raise OSError(errno.EIO, "Input/output error")


@pytest.fixture
def state(tmp_path: Path) -> Path:
    DirectoryStore(str(tmp_path), tpm2=True).store("permall", OLD)
    return tmp_path


def with_steps(steps: Steps, call: Callable[[], None]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(directory, "os", steps)
        patch.setattr(files, "os", steps)
        call()


def reopened(state: Path) -> DirectoryStore:
    return DirectoryStore(str(state), tpm2=True)


def step_names(state: Path) -> list[str]:
    steps = Steps(None, dies=False)
    store = reopened(state)
    with_steps(steps, lambda: store.store("permall", OLD))
    store.close()
    return steps.trace


def test_order_of_flushes(state: Path) -> None:
    """The contents are on disk before the name is, and the name before the call returns."""
    trace = step_names(state)
    write = trace.index("write")
    assert "fsync" in trace[:write], "the old name comes first"
    first, rename, second = (
        trace.index("fsync", write),
        trace.index("replace"),
        len(trace) - 1 - trace[::-1].index("fsync"),
    )
    assert write < first < rename < second


def outcome(call: Callable[[], None]) -> StorageError | None:
    try:
        call()
    except StateMissing:
        pytest.fail("a failure was taken for absence")
    except StorageError as exc:
        return exc
    return None


def failed_at(state: Path, at: int) -> tuple[bool, list[str]]:
    """Replaces OLD by NEW, with a failure: whether it was told, and the steps."""
    reopened(state).store("permall", OLD)
    steps = Steps(at, dies=False)
    before = open_descriptors()
    store = reopened(state)
    error = outcome(lambda: with_steps(steps, lambda: store.store("permall", NEW)))
    store.close()
    assert open_descriptors() <= before, "a descriptor leaks"
    return error is not None, steps.trace


def test_every_step_may_fail(state: Path) -> None:
    for at, name in enumerate(step_names(state)):
        told, trace = failed_at(state, at)
        store = reopened(state)
        assert trace[at] == name
        assert told, (at, name)
        assert store.load("permall") == (NEW if "replace" in trace[:at] else OLD), (at, name)
        store.store("permall", NEW)
        assert store.load("permall") == NEW
        store.close()


def test_failure_leaves_nothing_behind(state: Path) -> None:
    for at, name in enumerate(step_names(state)):
        failed_at(state, at)
        assert [path.name for path in state.iterdir()] == ["tpm2-00.permall"], (at, name)


def test_death_at_every_step(state: Path) -> None:
    for at, name in enumerate(step_names(state)):
        reopened(state).store("permall", OLD)
        child = os.fork()
        if child == 0:
            store = reopened(state)
            with_steps(Steps(at, dies=True), lambda: store.store("permall", NEW))  # noqa: B023
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 77, (at, name)
        survivor = reopened(state)
        assert survivor.load("permall") in {OLD, NEW}, (at, name)
        assert list(survivor.sizes()) == ["permall"]
        survivor.store("permall", NEW)
        assert survivor.load("permall") == NEW
        survivor.close()


def test_failed_load_is_never_absence(state: Path) -> None:
    steps = Steps(None, dies=False)
    store = reopened(state)
    with_steps(steps, lambda: _load(store))
    store.close()
    for at, name in enumerate(steps.trace):
        before = open_descriptors()
        store = reopened(state)
        error = outcome(partial(with_steps, Steps(at, dies=False), partial(_load, store)))
        assert error is not None, (at, name)
        store.close()
        assert open_descriptors() <= before, f"step {at}, {name}, leaks a descriptor"
    assert reopened(state).load("permall") == OLD


def _load(store: DirectoryStore) -> None:
    store.load("permall")
