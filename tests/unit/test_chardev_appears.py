"""What has been done before the kernel is asked for a TPM device."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import trio

from tests.support.engine import FakeEngine
from tests.support.stores import FailingStore
from vtpm_cuse.acquire.chardev import CharDevice
from vtpm_cuse.config import ChardevConfig, VtpmConfig
from vtpm_cuse.service import chardev
from vtpm_cuse.storage.sealed import SealedStore
from vtpm_cuse.vtpm.vtpm import Vtpm
from vtpm_cuse.wire.vtpmx import VtpmProxyNewDev

if TYPE_CHECKING:
    import pytest


class Kernel:
    """In place of who asks the real one: notes what the TPM has done by then."""

    def __init__(self, engine: FakeEngine) -> None:
        self._engine = engine
        self.found: list[str] = []

    def make(self) -> tuple[CharDevice, VtpmProxyNewDev]:
        self.found = list(self._engine.calls)
        return CharDevice(os.open(os.devnull, os.O_RDWR)), VtpmProxyNewDev(0, 7, 0, 10, 3)

    def close(self) -> None:
        pass


def test_the_kernels_own_test_finds_it_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    """It gives that three seconds, which a slow machine needs."""
    engine = FakeEngine()
    kernel = Kernel(engine)
    vtpm = Vtpm(engine, SealedStore(FailingStore()))
    vtpm.start()
    monkeypatch.setattr(chardev, "ProxyMaker", lambda tpm2: kernel)
    told: list[str] = []
    interface = chardev._Chardev(ChardevConfig(VtpmConfig(tpm2=True), proxy=True), told.append)
    interface.open()
    trio.run(interface.appear, vtpm)
    interface.close()
    assert told == ["New TPM device: /dev/tpm7 (major/minor = 10/3)"]
    assert kernel.found == ["start", "process:143"]
