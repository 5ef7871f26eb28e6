"""Stores for tests: one that fails on demand."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vtpm_cuse.storage.memory import MemoryStore

if TYPE_CHECKING:
    from vtpm_cuse.errors import StorageError


class FailingStore(MemoryStore):
    """Raises what `faults` says for a method's name."""

    def __init__(self) -> None:
        super().__init__()
        self.faults: dict[str, StorageError] = {}
        self.locks = 0

    def _check(self, name: str) -> None:
        if name in self.faults:
            raise self.faults[name]

    def load(self, name: str) -> bytes:
        self._check("load")
        self._check(f"load:{name}")
        return super().load(name)

    def store(self, name: str, blob: bytes) -> None:
        self._check("store")
        super().store(name, blob)

    def delete(self, name: str, *, must_exist: bool = False) -> None:
        self._check("delete")
        super().delete(name, must_exist=must_exist)

    def lock(self) -> None:
        self.locks += 1
        self._check("lock")
        super().lock()
