"""A manager with real workers whose TPMs are devices; the kernel's end of them is here."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import struct
import threading
from typing import TYPE_CHECKING

import pytest
import trio

from tests.support import commands as tpm
from tests.support import kernel as fake
from tests.support import managed as m
from tests.support import ptm
from tests.support.fleet import UID, blobs_of_one, fleet, in_trio, started, until
from tests.support.fleet_devices import MAJOR, answer_of, fake_opener, started_device
from tests.support.kernel import FakeKernel
from tests.support.suspension import SCRIPT, masked
from vtpm_cuse.errors import FleetError, FrontendError
from vtpm_cuse.fleet.base import Spec
from vtpm_cuse.fleet.opener import Wanted

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from tests.support.channel import Client
    from vtpm_cuse.fleet.manager.manager import Manager

RAW, MANY = "vtpmd-one", "vtpmdrm-one"
_DYING_SECONDS = 0.2


async def _story(
    raw: Client, many: Client, between: Callable[[], Awaitable[object]]
) -> list[object]:
    """All that clients of the two devices see, who have them open."""
    seen: list[object] = []

    async def note(answer: object) -> None:
        seen.append(answer)
        await between()

    for command in SCRIPT:
        await note(masked(command, await answer_of(raw, command)))
    for number, argument in (
        *((ptm.SET_LOCALITY, ptm.u32(3)), (ptm.GET_TPMESTABLISHED, b"")),
        *((ptm.SET_LOCALITY, ptm.u32(0)), (ptm.GET_CONFIG, b"")),
    ):
        await note(await raw.ioctl(number, argument))
    session = m.handle_of(await answer_of(many, m.start_session()))
    await between()
    for command in (
        *(m.policy_command_code(session, 0x15D), m.policy_digest(session), m.sequence_start()),
        *(m.sequence_update(0x80000000, b"data"), m.sequence_complete(0x80000000)),
        *(tpm.pcr_extend(10, b"1" * 32), tpm.pcr_read(10)),
    ):
        await note(await answer_of(many, command))
    await note(await raw.ioctl(ptm.INIT, ptm.u32(0)))
    await note(await answer_of(raw, tpm.TPM2_STARTUP_CLEAR))
    await note(await answer_of(many, tpm.pcr_read(10)))
    return seen


@in_trio
async def test_nobody_sees_a_sleep_between_any_two_requests(tmp_path: Path) -> None:
    blobs = blobs_of_one()
    with fake_opener() as opener:
        async with fleet(tmp_path, opener) as manager:
            stories = []
            for name, between in (
                ("plain", trio.lowlevel.checkpoint),
                ("restless", lambda: manager.hibernate("restless")),
            ):
                await started_device(manager, name, blobs)
                raw = await opener.opened(f"vtpmd-{name}")
                many = await opener.opened(f"vtpmdrm-{name}")
                stories.append(await _story(raw, many, between))
            assert stories[0] == stories[1]
            assert (await manager.describe("restless")).wakes >= len(stories[0]) - 1
            assert (await manager.describe("plain")).wakes == 0


@in_trio
async def test_who_has_it_open_does_not_keep_it_awake_and_wakes_it(tmp_path: Path) -> None:
    with fake_opener() as opener:
        async with fleet(tmp_path, opener, idle=0.05) as manager:
            await started_device(manager, "one")
            raw, many = await opener.opened(RAW), await opener.opened(MANY)
            await until(manager, "one", "asleep")
            assert (await manager.describe("one")).pid is None
            for client in (raw, many):
                assert tpm.code_of(await answer_of(client, tpm.get_random(8))) == 0
                await until(manager, "one", "asleep")
            await raw.release()  # this alone wakes it, too
            await until(manager, "one", "asleep")


async def _sleeps_while_a_key_is_made(manager: Manager, raw: Client) -> bool:
    """Whether it can be put to sleep with a read that waits for a key."""
    assert await raw.write(tpm.create_primary_rsa()) == 0
    waits = await raw.start_read()
    sleeps = True
    try:
        await manager.hibernate("one")
    except FleetError as exc:
        assert "in the middle" in str(exc)  # noqa: PT017  it need not be raised
        sleeps = False
    answered, _, answer = await raw.receive()
    assert (answered, tpm.code_of(answer)) == (waits, 0)
    return sleeps


async def _stays(manager: Manager) -> None:
    with pytest.raises(FleetError, match="in the middle"):
        await manager.hibernate("one")


@in_trio
async def test_it_does_not_sleep_in_the_middle_of_something(tmp_path: Path) -> None:
    with fake_opener() as opener:
        async with fleet(tmp_path, opener) as manager:
            await started_device(manager, "one")
            raw, many = await opener.opened(RAW), await opener.opened(MANY)
            for client in (raw, many):  # an answer that is unread, or read in part
                assert await client.write(tpm.get_random(8)) == 0
                await _stays(manager)
                assert len(await client.read(10)) == 10
                await _stays(manager)
                assert len(await client.read()) == 10
                await manager.hibernate("one")
            assert await raw.ioctl(ptm.HASH_START) == 0
            await _stays(manager)
            assert await raw.ioctl(ptm.HASH_END) == 0
            await manager.hibernate("one")
            await raw.start_ioctl(ptm.GET_STATEBLOB, ptm.u32(0, ptm.VOLATILE, 0))
            await raw.receive()
            await _stays(manager)
            while await raw.read():
                pass
            await manager.hibernate("one")
            while await _sleeps_while_a_key_is_made(manager, raw):
                pass  # that was quicker: once more
            await manager.hibernate("one")
            # What nobody is there to read keeps nothing awake; it is there later, as in the C suite.
            assert await raw.write(tpm.get_random(8)) == 0
            await raw.release()
            await manager.hibernate("one")
            raw = await opener.opened(RAW)
            assert len(await raw.read()) == 20


@in_trio
async def test_a_dead_worker_is_a_failed_tpm_whose_clients_stay(tmp_path: Path) -> None:
    with fake_opener() as opener:
        async with fleet(tmp_path, opener) as manager:
            await started_device(manager, "one")
            raw, many = await opener.opened(RAW), await opener.opened(MANY)
            left = await opener.opened(MANY)
            assert tpm.code_of(await answer_of(raw, tpm.pcr_extend(10, b"1" * 32))) == 0
            pid = (await manager.describe("one")).pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            await until(manager, "one", "failed")
            for client in (raw, many):  # by itself: nobody may ask for anything else
                assert await client.receive() == (0, -7, b"")  # FUSE_NOTIFY_RESEND
            orphan = 1000  # as if the dead one had taken this request
            await raw.interrupt(orphan)
            assert await raw.receive() == (orphan, errno.EINTR, b"")
            assert tpm.code_of(await answer_of(raw, tpm.pcr_read(10))) == 0x101
            assert tpm.code_of(await answer_of(many, tpm.pcr_read(10))) == 0x101
            assert (await manager.describe("one")).state == "failed"
            assert await raw.ioctl(ptm.INIT, ptm.u32(0)) == 0
            assert tpm.code_of(await answer_of(raw, tpm.TPM2_STARTUP_CLEAR)) == 0
            assert tpm.pcr_value(await answer_of(many, tpm.pcr_read(10))) == bytes(32)
            assert (await manager.describe("one")).state == "awake"
            await manager.hibernate("one")
            await left.release()
            new = await opener.opened(MANY)
            assert new.handle > many.handle
            assert len({left.handle, many.handle, new.handle}) == 3


@in_trio
async def test_the_devices_go_when_it_is_off(tmp_path: Path) -> None:
    with fake_opener() as opener:
        async with fleet(tmp_path, opener) as manager:
            await started_device(manager, "one")
            (found,) = await manager.list()
            assert (found.interface, dict(found.sockets)) == ("cuse", {})
            assert (found.device, found.managed_device) == (f"/dev/{RAW}", f"/dev/{MANY}")
            await manager.stop("one")
            assert opener.gone(RAW)
            assert opener.gone(MANY)
            await manager.start("one")
            raw = await opener.opened(RAW)
            assert await raw.ioctl(ptm.SHUTDOWN) == 0
            await raw.release()
            await until(manager, "one", "stopped")
            assert opener.gone(RAW)
            await manager.start("one")
            await manager.hibernate("one")
            await manager.remove("one", force=True)
            assert opener.gone(MANY)
            assert await manager.list() == []


@in_trio
async def test_who_is_still_dying_holds_no_device_of_one_that_is_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that takes its time."""
    send = signal.pidfd_send_signal
    timers: list[threading.Timer] = []

    def die(pidfd: int, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            send(pidfd, number)
        os.close(pidfd)

    def slowly(pidfd: int, number: int) -> None:
        send(pidfd, signal.SIGSTOP)  # nor does it end by itself
        timers.append(threading.Timer(_DYING_SECONDS, die, (os.dup(pidfd), number)))
        timers[-1].start()

    with fake_opener() as opener:
        async with fleet(tmp_path, opener, spare=0) as manager:
            await started_device(manager, "one")
            monkeypatch.setattr(signal, "pidfd_send_signal", slowly)
            await manager.hibernate("one")
            await manager.stop("one")
            assert opener.gone(RAW)
            assert opener.gone(MANY)
    for timer in timers:
        timer.join()
    assert timers


@in_trio
async def test_a_reset_ends_the_command_that_runs(tmp_path: Path) -> None:
    with fake_opener() as opener:
        async with fleet(tmp_path, opener) as manager:
            await started_device(manager, "one")
            raw = await opener.opened(RAW)
            assert tpm.code_of(await answer_of(raw, tpm.pcr_extend(10, b"1" * 32))) == 0
            assert await raw.write(tpm.create_primary_rsa()) == 0
            waits = await raw.start_read()
            await manager.reset("one")
            assert (await raw.receive())[0] == waits
            assert tpm.pcr_value(await answer_of(raw, tpm.pcr_read(10))) == bytes(32)


@in_trio
async def test_numbers_are_each_ones_own_and_stay(tmp_path: Path) -> None:
    with fake_opener() as opener:
        async with fleet(tmp_path, opener) as manager:
            await started_device(manager, "one")
            await started_device(manager, "two")
            await manager.remove("one", force=True)
            await started_device(manager, "three")
        async with fleet(tmp_path, opener) as manager:
            await started(manager, "none")
            await manager.start("two")
            await manager.stop("none")
            bundle = await manager.export("none")
            await manager.remove("none")
            spec = bundle.spec._replace(name="four", interface="cuse")
            await manager.take_in(bundle._replace(spec=spec))
            await manager.start("four")
    assert opener.wanted == [
        *(Wanted("vtpmd-one", UID, 0, 0), Wanted("vtpmdrm-one", UID, MAJOR, 1)),
        *(Wanted("vtpmd-two", UID, MAJOR, 2), Wanted("vtpmdrm-two", UID, MAJOR, 3)),
        *(Wanted("vtpmd-three", UID, MAJOR, 0), Wanted("vtpmdrm-three", UID, MAJOR, 1)),
        *(Wanted("vtpmd-two", UID, MAJOR, 2), Wanted("vtpmdrm-two", UID, MAJOR, 3)),
        *(Wanted("vtpmd-four", UID, MAJOR, 4), Wanted("vtpmdrm-four", UID, MAJOR, 5)),
    ]


@in_trio
async def test_one_device_without_the_other_is_none(tmp_path: Path) -> None:
    with fake_opener() as opener:
        opener.refused.add(MANY)
        async with fleet(tmp_path, opener) as manager:
            await manager.create(Spec("one", UID, interface="cuse"))
            with pytest.raises(FrontendError, match="refused"):
                await manager.start("one")
            assert (await manager.describe("one")).state == "stopped"
            assert opener.gone(RAW)
            opener.refused.clear()
            await manager.start("one")


@in_trio
async def test_a_manager_without_an_opener_makes_no_devices(tmp_path: Path) -> None:
    async with fleet(tmp_path, spare=0) as manager:
        with pytest.raises(FrontendError, match="alone has"):
            await manager.create(Spec("one", UID, interface="cuse"))
        assert await manager.list() == []


@in_trio
async def test_its_owner_may_act_as_the_platform_and_nobody_else(tmp_path: Path) -> None:
    with fake_opener() as opener:
        async with fleet(tmp_path, opener) as manager:
            await manager.create(Spec("one", 4242, interface="cuse"))
            await manager.start("one")
            raw = await opener.opened(RAW)
            assert opener.wanted[0].owner == 4242
            for uid, error in ((0, 0), (4242, 0), (4243, errno.EPERM)):
                body = struct.pack("=QIIQII", raw.handle, 0, ptm.STOP, 0, 0, 4)
                message = FakeKernel.message(fake.IOCTL, 1000 + uid, body, uid=uid)
                opener.ends[RAW].send(message)
                assert (await raw.receive())[:2] == (1000 + uid, error)
