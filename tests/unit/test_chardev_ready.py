"""When a TPM of the kernel's is there for who waits for it; its device is not the kernel's here."""

from __future__ import annotations

import logging
import os

import pytest
import trio
import trio.testing

from tests.support.engine import FakeEngine
from tests.support.stores import FailingStore
from vtpm_cuse.acquire.chardev import CharDevice
from vtpm_cuse.config import ChardevConfig, VtpmConfig
from vtpm_cuse.service import chardev
from vtpm_cuse.storage.sealed import SealedStore
from vtpm_cuse.vtpm.vtpm import Vtpm
from vtpm_cuse.wire.vtpmx import VtpmProxyNewDev

SYSFS, NODE = "/sys/class/tpmrm/tpmrm7", "/dev/tpmrm7"


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """What there is."""
    found = {"/sys/class"}
    monkeypatch.setattr(chardev, "_exists", found.__contains__)
    return found


async def waited(name: str = "tpmrm7") -> float:
    """Seconds of the clock below that it took."""
    begun = trio.current_time()
    await chardev._shown(name)
    return trio.current_time() - begun


def run(there: set[str], **later: float) -> float:
    """The same, while *later* says after how many seconds sysfs or node come."""

    async def appear(path: str, seconds: float) -> None:
        await trio.sleep(seconds)
        there.add(path)

    async def main() -> float:
        async with trio.open_nursery() as nursery:
            for name, seconds in later.items():
                nursery.start_soon(appear, {"sysfs": SYSFS, "node": NODE}[name], seconds)
            took = await waited()
            nursery.cancel_scope.cancel()
        return took

    clock = trio.testing.MockClock(autojump_threshold=0)
    return float(trio.run(main, clock=clock))


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


def test_with_its_device(there: set[str], caplog: pytest.LogCaptureFixture) -> None:
    took = run(there, sysfs=1.0, node=1.05)
    assert 1.05 <= took < 1.1
    assert caplog.records == []


def test_in_a_container_without_its_device(
    there: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert 1.2 <= run(there, sysfs=1.0) < 1.3
    assert caplog.records == []


def test_not_at_all(there: set[str], caplog: pytest.LogCaptureFixture) -> None:
    """As while a slow machine's kernel still tests the TPM: who waits is not kept for ever."""
    with caplog.at_level(logging.WARNING):
        assert run(there) == 10
    assert caplog.messages == ["The kernel does not show /dev/tpmrm7 yet"]


def test_where_sysfs_cannot_be_seen(there: set[str], caplog: pytest.LogCaptureFixture) -> None:
    there.clear()
    assert run(there) == 0
    assert caplog.records == []
