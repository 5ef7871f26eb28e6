"""A vTPM and what serves it, suspended and resumed at every step: no client can tell.

On the real library, one TPM after the other; what differs are the random numbers.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Final

import pytest

from tests.support import commands as tpm
from tests.support import ptm
from tests.support.engine import FakeEngine
from tests.support.kernel import FakeKernel, Jobs, Reply
from tests.support.processes import in_child
from tests.support.ptm import u32
from tests.support.stores import FailingStore
from tests.support.suspension import SCRIPT, Host, chances, command_of, masked, prepared
from vtpm_cuse.errors import DeviceError, EngineError, VtpmError
from vtpm_cuse.proto.device import DeviceSession
from vtpm_cuse.storage.sealed import SealedStore
from vtpm_cuse.vtpm.file import SavedOpen, TpmDeviceFile
from vtpm_cuse.vtpm.ptm import PtmService
from vtpm_cuse.vtpm.vtpm import SavedVtpm, Vtpm, VtpmOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

SEEDS: Final = range(12)
STEPS: Final = 80


# -- the vTPM alone -----------------------------------------------------------------------


def test_every_value_outlives_a_suspension() -> None:
    saved = SavedVtpm(
        whose="handed out",
        running=True,
        volatile=b"volatile",
        locality=3,
        buffer_size=3000,
        last_header=b"\x80\x01\0\0\0\x0c\0\0\1\x45",
        hashing=True,
        failure_said=True,
        profile='{"Name":"x"}',
        given=(("permall", b"p"), ("savestate", None)),
    )
    engine = FakeEngine()
    vtpm = Vtpm(engine, SealedStore(FailingStore()))
    vtpm.resume(saved)
    assert engine.given == {"permall": b"p", "savestate": None, "volatilestate": b"volatile"}
    assert engine.calls[-1] == "start"
    assert vtpm.suspend() == saved
    assert not engine.running
    assert engine.commands == []  # no TPM2_Shutdown


def test_one_that_is_off_outlives_it_too() -> None:
    vtpm = Vtpm(FakeEngine(), None, VtpmOptions(incoming=True, profile="{}"))
    saved = vtpm.suspend()
    assert saved == SavedVtpm("incoming", False, b"", 0, 4096, b"", False, False, "{}", ())
    engine = FakeEngine()
    resumed = Vtpm(engine, None)
    resumed.resume(saved)
    assert "start" not in engine.calls
    assert resumed.suspend() == saved


def test_a_tpm_that_cannot_be_saved_runs_on() -> None:
    engine = FakeEngine()
    vtpm = Vtpm(engine, SealedStore(FailingStore()))
    vtpm.start()
    engine.faults["volatile_state"] = EngineError("TPMLIB_VolatileAll_Store", 9)
    with pytest.raises(EngineError):
        vtpm.suspend()
    assert vtpm.running


@pytest.mark.parametrize("tpm2", [True, False], ids=["tpm2", "tpm12"])
@in_child
def test_no_new_tpm_begins_where_the_state_has_gone(tpm2: bool) -> None:
    host = Host({}, tpm2=tpm2)
    host.vtpm.start()
    saved = host.vtpm.suspend()
    host.close()
    other = Host({}, tpm2=tpm2)
    with pytest.raises(VtpmError):
        other.vtpm.resume(saved)
    assert not other.vtpm.running
    assert other.store.blobs == {}


@in_child
def test_a_tpm12_outlives_a_suspension() -> None:
    blobs = prepared(tpm2=False)
    script = (
        *(tpm.TPM12_STARTUP_CLEAR, tpm.tpm12_pcr_extend(10, b"1" * 20), tpm.tpm12_pcr_read(10)),
        *(tpm.tpm12(0xA0), tpm.tpm12(0xA1, b"\0\0\0\x40" + b"a" * 64), tpm.tpm12_pcr_read(10)),
        *(tpm.tpm12(0xA0), tpm.tpm12(0xA1, b"\0\0\0\x40" + b"a" * 64)),
        *(tpm.tpm12(0xA2, b"\0\0\0\3abc"), tpm.tpm12_pcr_read(10)),
    )

    def run(after: Callable[[Host], None]) -> list[object]:
        host = Host(blobs, tpm2=False)
        seen: list[object] = []
        host.vtpm.start()
        for command in script:
            seen.append((host.vtpm.process(command), _asked(host.vtpm), *host.seen()))
            after(host)
        host.close()
        return seen

    assert run(Host.renew) == run(lambda _: None)


# -- behind a device ----------------------------------------------------------------------


class Device:
    """A device of the real library in memory; long commands are done when they are given."""

    restless = False

    def __init__(self, blobs: dict[str, bytes]) -> None:
        self.host = Host(blobs)
        self.jobs = Jobs()
        self._make()
        self.kernel = FakeKernel(self.session, self._after)
        self.exported: dict[int, bytes] = {}

    def _make(self) -> None:
        vtpm = self.host.vtpm
        self.file = TpmDeviceFile(vtpm, PtmService(vtpm), self.jobs.submit, self._wake)
        self.session: DeviceSession[SavedOpen] = DeviceSession(self.file)

    def _wake(self) -> None:
        for message in self.session.wake():
            self.kernel.take(message)

    def _after(self) -> None:
        if self.file.pending is not None:
            self.file.run_pending()
        while self.jobs.waiting:
            self.jobs.run()
        if self.restless:
            self._renew()

    def _renew(self) -> None:
        saved, response = self.session.suspend(), bytes(self.file.response)
        self.host.renew()
        self._make()
        self.file.response = memoryview(response)
        self.session.resume(saved)
        self.kernel.session = self.session


class RestlessDevice(Device):
    restless = True


def _asked(vtpm: Vtpm) -> object:
    """What the texts beside a device would show."""
    command = tpm.pcr_read(16) if vtpm.tpm2 else tpm.tpm12_pcr_read(16)
    try:
        return vtpm.query(command)
    except DeviceError as exc:
        return exc.errno
    except VtpmError as exc:
        return str(exc)


def device_step(device: Device, chance: random.Random) -> object:
    """One thing that a client of a device may do, and all that can be seen of it."""
    kernel = device.kernel

    def ioctl(number: int, argument: bytes = b"") -> Reply | None:
        return kernel.result(kernel.start_ioctl(number, argument))

    kind = chance.choice(("command",) * 6 + ("power",) * 2 + ("hash", "ioctl", "blob", "move"))
    match kind:
        case "command":
            return exchange(kernel, command_of(chance), chance.choice((4096, 4096, 7)))
        case "power":
            return [
                ioctl(ptm.STOP) if chance.random() < 0.5 else None,
                ioctl(ptm.INIT, u32(chance.randrange(2))),
                exchange(kernel, chance.choice((tpm.TPM2_STARTUP_STATE, tpm.TPM2_STARTUP_CLEAR))),
            ]
        case "hash":
            data = u32(3) + b"abc"
            return [ioctl(ptm.HASH_START), ioctl(ptm.HASH_DATA, data), ioctl(ptm.HASH_END)][
                : chance.randrange(1, 4)
            ]
        case "ioctl":
            return ioctl(
                chance.choice(
                    (
                        *(ptm.GET_TPMESTABLISHED, ptm.SET_LOCALITY, ptm.RESET_TPMESTABLISHED),
                        *(ptm.STORE_VOLATILE, ptm.SET_BUFFERSIZE, ptm.GET_CONFIG),
                        *(ptm.LOCK_STORAGE, ptm.GET_INFO),
                    )
                ),
                u32(chance.choice((0, 1, 3, 4, 5, 3500))),
            )
        case "blob":
            for blob in (ptm.PERMANENT, ptm.VOLATILE):
                device.exported[blob] = _exported(kernel, blob)
            return [bool(blob) for blob in device.exported.values()]
    return _move(device, ioctl, chance)


def exchange(kernel: FakeKernel, command: bytes, size: int = 4096) -> object:
    """A command, and its response in one piece or many."""
    kernel.write(command)
    response = b""
    while part := kernel.read(size).body:
        response += part
    return masked(command, response)


def _exported(kernel: FakeKernel, kind: int) -> bytes:
    got, total = b"", 1
    while len(got) < total:
        result, _, total, part = ptm.get_blob(kernel, kind, len(got))
        if result:
            return b""
        got += part
    return got


def _move(
    device: Device, ioctl: Callable[[int, bytes], Reply | None], chance: random.Random
) -> object:
    """What was handed out comes back, in parts, and is started from, or not."""
    seen: list[object] = [ioctl(ptm.STOP, b"")]
    for kind, blob in sorted(device.exported.items()):
        for start in range(0, len(blob) + 1, ptm.PART):
            part = blob[start : start + ptm.PART]
            seen.append(ptm.set_blob(device.kernel, kind, part))
    if chance.random() < 0.8:
        seen.append(ioctl(ptm.INIT, u32(0)))
    return [*seen, exchange(device.kernel, tpm.pcr_read(10))]


def both_devices(steps: Callable[[Device], Iterable[object]]) -> None:
    """The same is seen of a device that is suspended behind every request as of one that is not."""
    blobs = prepared()
    seen = []
    for kind in (Device, RestlessDevice):
        device = kind(blobs)
        assert device.kernel.open().error == 0
        seen.append(
            [(step, _asked(device.host.vtpm), *device.host.seen()) for step in steps(device)]
        )
        device.host.close()
    plain, restless = seen
    assert len(plain) >= len(SCRIPT)
    for number, (expected, found) in enumerate(zip(plain, restless, strict=True)):
        assert found == expected, number


@pytest.mark.parametrize("seed", SEEDS)
@in_child
def test_a_device_suspended_behind_every_request(seed: int) -> None:
    def steps(device: Device) -> Iterable[object]:
        yield device_step(device, random.Random(seed))  # noqa: S311
        device.kernel.ioctl(ptm.INIT, u32(0))
        exchange(device.kernel, tpm.TPM2_STARTUP_CLEAR)
        for chance in chances(seed, STEPS):
            yield device_step(device, chance)

    both_devices(steps)


@in_child
def test_what_a_device_has_to_lose_outlives_a_suspension() -> None:
    def steps(device: Device) -> Iterable[object]:
        kernel = device.kernel
        yield kernel.ioctl(ptm.SET_BUFFERSIZE, u32(3500))
        yield kernel.ioctl(ptm.INIT, u32(0))
        for command in SCRIPT:
            yield exchange(kernel, command)
        for blob in (ptm.PERMANENT, ptm.VOLATILE):
            device.exported[blob] = _exported(kernel, blob)
        yield kernel.ioctl(ptm.HASH_START)
        yield kernel.ioctl(ptm.HASH_DATA, u32(3) + b"abc")
        yield kernel.ioctl(ptm.HASH_END)
        yield exchange(kernel, tpm.pcr_read(17))
        for last in (tpm.TPM2_SHUTDOWN_CLEAR, tpm.pcr_read(10)):
            yield exchange(kernel, last)
            yield kernel.ioctl(ptm.STOP)
            yield kernel.ioctl(ptm.INIT, u32(0))
            yield exchange(kernel, tpm.TPM2_STARTUP_STATE)
            yield exchange(kernel, tpm.TPM2_STARTUP_CLEAR)
        yield _move(device, lambda n, a: kernel.ioctl(n, a), random.Random(1))  # noqa: S311
        yield exchange(kernel, tpm.pcr_read(10))

    both_devices(steps)
