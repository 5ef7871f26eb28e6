"""A manager with real workers, one of whose TPMs is the kernel's; the kernel's end of it is here."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import struct
from typing import TYPE_CHECKING

import pytest
import trio

from tests.support import commands as tpm
from tests.support.fleet import LAZY, UID, fleet, in_trio, started, until
from tests.support.fleet_devices import FIRST_NUMBER, fake_opener
from tests.support.waiting import PATIENCE_SECONDS
from vtpm_cuse.errors import FrontendError
from vtpm_cuse.fleet import heritage
from vtpm_cuse.fleet.base import Spec
from vtpm_cuse.fleet.manager import entrances
from vtpm_cuse.fleet.manager.manager import Settings, managed

if TYPE_CHECKING:
    from pathlib import Path

    from vtpm_cuse.fleet.manager.manager import Manager

NAME = f"tpm{FIRST_NUMBER}"
SET_LOCALITY = bytes.fromhex("80020000000b2000100000")
SUCCESS = bytes.fromhex("80010000000a00000000")
FAILURE = bytes.fromhex("80010000000a00000101")
_SIOCOUTQ = 0x5411


@pytest.fixture(autouse=True)
def _shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel, which is us, has answers to all that it asks before it shows one."""
    monkeypatch.setattr(entrances, "_is_shown", lambda _: True)


async def ask(end: socket.socket, command: bytes) -> bytes:
    """As the kernel does."""
    end.send(command)
    return await answer(end)


async def answer(end: socket.socket) -> bytes:
    await trio.lowlevel.wait_readable(end)
    return end.recv(4096)


async def answer_of_a_dead_one(manager: Manager, end: socket.socket) -> bytes:
    """What is answered to a command in the middle of which the worker is killed."""
    while True:
        pid = (await manager.describe("one")).pid
        assert pid is not None
        end.send(tpm.create_primary_rsa())
        while struct.unpack("i", fcntl.ioctl(end, _SIOCOUTQ, bytes(4)))[0]:
            await trio.lowlevel.checkpoint()  # until it has been read
        os.kill(pid, signal.SIGKILL)
        await until(manager, "one", "failed")
        found = await answer(end)
        if tpm.code_of(found):
            return found
        # It was quicker: once more. What the next one gives all the same, a kernel refuses.
        assert await answer(end) == FAILURE
        await manager.reset("one")


@in_trio
async def test_the_kernel_sees_no_sleep(tmp_path: Path) -> None:
    with fake_opener() as opener:
        async with fleet(tmp_path, opener) as manager:
            made = await manager.create(Spec("one", UID, interface="vtpm-proxy"))
            assert (made.device, made.managed_device, dict(made.sockets)) == (None, None, {})
            made = await manager.start("one")
            assert (made.device, made.managed_device) == (f"/dev/{NAME}", f"/dev/tpmrm{NAME[3:]}")
            assert opener.given == [(FIRST_NUMBER, UID)]
            end = opener.ends[NAME]
            assert await ask(end, SET_LOCALITY) == SUCCESS
            assert await ask(end, tpm.TPM2_STARTUP_CLEAR) != SUCCESS  # it is on already
            assert tpm.code_of(await ask(end, tpm.pcr_extend(10, b"1" * 32))) == 0
            extended = await ask(end, tpm.pcr_read(10))
            for _ in range(2):
                assert (await manager.hibernate("one")).pid is None
                assert await ask(end, tpm.pcr_read(10)) == extended
            assert (await manager.describe("one")).wakes == 2
            await manager.stop("one")
            assert opener.gone(NAME)
            made = await manager.start("one")  # which may be called otherwise
            assert made.device == f"/dev/tpm{FIRST_NUMBER + 1}"


@in_trio
async def test_it_sleeps_by_itself_and_not_within_a_command(tmp_path: Path) -> None:
    with fake_opener() as opener:
        async with fleet(tmp_path, opener, idle=0.05) as manager:
            await started(manager, "one", interface="vtpm-proxy")
            end = opener.ends[NAME]
            await until(manager, "one", "asleep")
            assert tpm.code_of(await ask(end, tpm.create_primary_rsa())) == 0
            await until(manager, "one", "asleep")


@in_trio
async def test_a_dead_workers_answer_is_given_by_the_next_one(tmp_path: Path) -> None:
    with fake_opener() as opener:
        async with fleet(tmp_path, opener) as manager:
            await started(manager, "one", interface="vtpm-proxy")
            end = opener.ends[NAME]
            assert tpm.code_of(await ask(end, tpm.pcr_extend(10, b"1" * 32))) == 0
            assert await answer_of_a_dead_one(manager, end) == FAILURE
            assert await ask(end, tpm.pcr_read(10)) == FAILURE
            assert await ask(end, tpm.get_random(8)) == FAILURE
            assert (await manager.reset("one")).state == "awake"
            assert tpm.pcr_value(await ask(end, tpm.pcr_read(10))) == bytes(32)


@in_trio
async def test_when_the_kernel_gives_it_up_it_is_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fake_opener() as opener:
        async with fleet(tmp_path, opener) as manager:
            await started(manager, "one", interface="vtpm-proxy")
            await manager.hibernate("one")
            opener.ends.pop(NAME).close()
            await until(manager, "one", "stopped")

            def is_shown(_: str) -> bool:
                opener.ends.pop(NAME).close() if NAME in opener.ends else None
                return False

            monkeypatch.setattr(entrances, "_is_shown", is_shown)
            with pytest.raises(FrontendError, match="given the TPM's device up"):
                await manager.start("one")
            assert (await manager.describe("one")).state == "stopped"


@in_trio
async def test_one_that_the_kernel_never_shows_is_not_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entrances, "_is_shown", lambda _: False)
    monkeypatch.setattr(entrances, "_SHOWN_SECONDS", 0.05)
    with fake_opener() as opener:
        async with fleet(tmp_path, opener) as manager:
            with pytest.raises(FrontendError, match="does not show"):
                await started(manager, "one", interface="vtpm-proxy")
            found = await manager.describe("one")
            assert (found.state, found.pid, found.device) == ("stopped", None, None)
            assert opener.gone(NAME)


@in_trio
async def test_the_next_manager_goes_on_with_it(tmp_path: Path) -> None:
    settings = Settings(str(tmp_path / "state"), str(tmp_path / "run"), idle=LAZY, spare=0)
    listener, other = socket.socketpair()
    with fake_opener() as opener, listener, other, trio.fail_after(PATIENCE_SECONDS):
        async with managed(settings, opener) as manager:
            await started(manager, "one", interface="vtpm-proxy")
            end = opener.ends[NAME]
            assert tpm.code_of(await ask(end, tpm.pcr_extend(10, b"1" * 32))) == 0
            extended = await ask(end, tpm.pcr_read(10))
            await manager.hibernate("one")
            left = await manager.leave(os.dup(listener.fileno()), own_path=False)
        left = heritage.read(heritage.written(left))
        os.close(left.manager.listener)
        async with managed(settings, opener, left) as manager:
            assert (await manager.describe("one")).device == f"/dev/{NAME}"
            assert await ask(end, tpm.pcr_read(10)) == extended
            await manager.stop("one")
            assert opener.gone(NAME)
