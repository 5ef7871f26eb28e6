"""A manager with real workers: what a client sees of sleeps, deaths and full disks."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import socket
from array import array
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from tests.support import commands as tpm
from tests.support import managed as m
from tests.support import sockets as s
from tests.support.fleet import (
    LAZY,
    UID,
    Client,
    blobs_of_one,
    filled,
    fleet,
    in_trio,
    random_of,
    started,
    until,
)
from tests.support.suspension import SCRIPT, masked
from tests.support.waiting import PATIENCE_SECONDS
from vtpm_cuse.config import KeySource
from vtpm_cuse.errors import ChannelError, FleetError, StorageError
from vtpm_cuse.fleet.base import Bundle, Spec
from vtpm_cuse.fleet.manager import machine
from vtpm_cuse.fleet.manager.pool import POOL
from vtpm_cuse.fleet.manager.quota import Limits
from vtpm_cuse.fleet.messages import Order
from vtpm_cuse.storage.keys import Key
from vtpm_cuse.wire.blob import BlobFlag, BlobTag, is_payload, split_header_untrusted
from vtpm_cuse.wire.ptm import PtmResult

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from vtpm_cuse.fleet.base import Tpm
    from vtpm_cuse.fleet.manager.manager import Manager

DATA = b"acknowledged"


async def _story(found: Tpm, between: Callable[[], Awaitable[object]]) -> list[object]:
    """All that clients of the three sockets see, who stay connected."""
    data, control, managed = [
        await Client.of(found, kind) for kind in ("data", "control", "managed")
    ]
    other = await Client.of(found, "managed")
    seen: list[object] = []

    async def note(answer: object) -> None:
        seen.append(answer)
        await between()

    for command in SCRIPT:
        if len(command) < 10:  # no response is due until more comes
            continue
        await note(masked(command, await data.ask(command)))
    for number, body, size in (
        *((s.GET_CAPABILITY, b"", 8), (s.SET_LOCALITY, bytes([3, 0, 0, 0]), 4)),
        *((s.GET_TPMESTABLISHED, b"", 8), (s.SET_LOCALITY, bytes(4), 4), (s.GET_CONFIG, b"", 8)),
    ):
        await note(await control.control(number, body, size))
    await note((await managed.ask(m.load_external(1)))[:14])
    session = m.handle_of(await managed.ask(m.start_session()))
    await between()
    for command in (
        *(m.policy_command_code(session, 0x15D), m.policy_digest(session), m.sequence_start()),
        *(m.sequence_update(0x80000001, b"data"), m.sequence_complete(0x80000001)),
        *(m.list_handles(0x80000000), tpm.pcr_extend(10, b"1" * 32), tpm.pcr_read(10)),
    ):
        await note(await managed.ask(command))
        await note(await other.ask(m.list_handles(0x80000000)))
    await note(await control.control(s.INIT, s.u32(0), 4))
    await note(await data.ask(tpm.TPM2_STARTUP_CLEAR))
    await note(await data.ask(tpm.pcr_read(10)))
    await note(await data.ask(tpm.nv_read(tpm.NV_INDEX, 8)))
    return seen


@in_trio
async def test_nobody_sees_a_sleep_or_a_look_between_any_two_commands(tmp_path: Path) -> None:
    blobs = blobs_of_one()
    async with fleet(tmp_path) as manager:
        plain = await _story(await started(manager, "plain", blobs), trio.lowlevel.checkpoint)
        found = await started(manager, "restless", blobs)
        seen = await _story(found, lambda: manager.hibernate("restless"))
        assert seen == plain
        assert (await manager.describe("restless")).wakes >= len(seen) - 1
        looks = []

        async def look() -> None:
            with contextlib.suppress(FleetError):  # as in the middle of a measurement
                looks.append(await manager.look("looked", "pcr-sha256/10"))

        assert await _story(await started(manager, "looked", blobs), look) == plain
        assert len(looks) > len(plain) / 2
        assert (await manager.describe("plain")).wakes == 0


@in_trio
async def test_a_tpm_sleeps_by_itself_and_wakes_for_a_client(tmp_path: Path) -> None:
    async with fleet(tmp_path, idle=0.05) as manager:
        events = manager.watch()
        found = await started(manager, "one")
        client = await Client.of(found)
        states = []
        async for event in events:
            states.append(event.tpm.state)
            if states.count("asleep") == 2:
                break
            if event.tpm.state == "asleep":
                assert event.tpm.pid is None
                assert tpm.code_of(await client.ask(tpm.get_random(8))) == 0
        assert states[:4] == ["stopped", "starting", "awake", "asleep"]
        assert event.tpm.sleeps == 2
        assert sum(manager.wake_times.counts) == event.tpm.wakes == 1
        # Half a command keeps it awake.
        await client.send(tpm.get_random(8)[:5])
        await until(manager, "one", "awake")
        with pytest.raises(FleetError, match="in the middle"):
            await manager.hibernate("one")
        await client.send(tpm.get_random(8)[5:])
        assert tpm.code_of(await client.answer()) == 0


@in_trio
async def test_whose_connections_have_no_room_in_the_manager_stays_awake(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with fleet(tmp_path, spare=0) as manager:
        found = await started(manager, "one")
        await filled(manager.plain_pool, POOL)  # who makes them has descriptors, too
        clients = [await Client.of(found, "managed") for _ in range(8)]
        for client in clients:
            assert tpm.code_of(await client.ask(tpm.get_random(8))) == 0
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 4, hard))
        try:
            with pytest.raises(FleetError, match="in the middle"):
                await manager.hibernate("one")
            assert (await manager.describe("one")).pid == found.pid
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        await manager.hibernate("one")
        for client in clients:
            assert tpm.code_of(await client.ask(tpm.get_random(8))) == 0


@in_trio
async def test_commands_are_counted_once_and_while_it_is_awake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_COUNT_SECONDS", LAZY)
    async with fleet(tmp_path) as manager:
        client = await Client.of(await started(manager, "one"))
        begun = (await manager.describe("one")).commands
        for number in range(1, 4):
            await client.ask(tpm.get_random(8))
            await manager.wake("one")  # which a client may have done before it is known
            assert (await manager.describe("one")).commands == begun + number
            assert [one.commands for one in await manager.list()] == [begun + number]
            await manager.hibernate("one")
            assert (await manager.describe("one")).commands == begun + number


@in_trio
async def test_random_numbers_are_nobody_elses_and_never_come_again(tmp_path: Path) -> None:
    blobs = blobs_of_one()
    async with fleet(tmp_path) as manager:
        clients = {
            name: await Client.of(await started(manager, name, blobs)) for name in ("a", "b")
        }
        seen: list[bytes] = []
        for _ in range(5):
            for name, client in clients.items():
                seen.append(random_of(await client.ask(tpm.get_random(16))))
                await manager.hibernate(name)
        assert len(set(seen)) == len(seen) == 10


@in_trio
async def test_a_data_connection_is_passed_as_qemu_does(tmp_path: Path) -> None:
    async with fleet(tmp_path) as manager:
        found = await started(manager, "one")
        control = await Client.of(found, "control")
        ours, theirs = trio.socket.socketpair()
        data = Client(ours)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind("")
        listener.listen()
        # With what is no connection of this host, the manager would not let it sleep.
        for given in (socket.socket(), listener, theirs):
            with given:
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [given.fileno()]))]
                await control.connection.sendmsg([s.u32(s.SET_DATAFD)], rights)
            assert await control.answer_of(4) == s.u32(
                0 if given is theirs else PtmResult.TPM_BAD_PARAMETER
            )
        assert tpm.code_of(await data.ask(tpm.pcr_extend(10, b"1" * 32))) == 0
        await manager.hibernate("one")
        assert tpm.pcr_value(await data.ask(tpm.pcr_read(10))) != bytes(32)
        assert (await manager.describe("one")).wakes == 1


async def _with_data(manager: Manager, name: str) -> tuple[Tpm, Client]:
    """A TPM that has acknowledged something to a client."""
    found = await started(manager, name)
    client = await Client.of(found)
    for command in (
        tpm.nv_define(tpm.NV_INDEX, len(DATA)),
        tpm.nv_write(tpm.NV_INDEX, DATA),
        tpm.pcr_extend(10, b"1" * 32),
    ):
        assert tpm.code_of(await client.ask(command)) == 0
    return found, client


@pytest.mark.parametrize("way", ["reset", "client", "client of a sleeper"])
@in_trio
async def test_a_dead_worker_is_a_failed_tpm_until_a_reset(tmp_path: Path, way: str) -> None:
    async with fleet(tmp_path) as manager:
        found, client = await _with_data(manager, "one")
        pid = (await manager.describe("one")).pid
        assert pid is not None
        await client.send(tpm.create_primary_rsa())  # in the middle of it
        os.kill(pid, signal.SIGKILL)
        await client.until_end()  # where the key was quicker, its answer has come
        await until(manager, "one", "failed")
        later = await Client.of(found)
        for command in (tpm.pcr_read(10), tpm.TPM2_STARTUP_CLEAR):
            assert tpm.code_of(await later.ask(command)) == 0x101  # TPM_RC_FAILURE
        assert (await manager.describe("one")).state == "failed"
        control = await Client.of(found, "control")
        if way == "client of a sleeper":
            assert await control.control(s.GET_CAPABILITY, b"", 8)
            assert await manager._machines["one"]._ask(Order.SLEEP) is None
            assert (await manager.describe("one")).pid is None
        if way == "reset":
            await manager.reset("one")
        else:
            assert await control.control(s.INIT, s.u32(0), 4) == bytes(4)
            assert tpm.code_of(await later.ask(tpm.TPM2_STARTUP_CLEAR)) == 0
        answer = await later.ask(tpm.nv_read(tpm.NV_INDEX, len(DATA)))
        assert tpm.nv_data(answer) == DATA
        after = await manager.describe("one")
        assert (after.state, after.failure, after.failures) == ("awake", "", 1)
        told = [note.text for note in await manager.logs("one")]
        assert told == ["created", "started", "failed: its process has ended", "started"]


@in_trio
async def test_a_dead_zygote_costs_no_tpm(tmp_path: Path) -> None:
    async with fleet(tmp_path, spare=0) as manager:
        _, client = await _with_data(manager, "one")
        zygote = manager.workers.zygote_pid
        assert zygote is not None
        os.kill(zygote, signal.SIGKILL)
        assert tpm.code_of(await client.ask(tpm.pcr_read(10))) == 0
        await manager.hibernate("one")
        assert tpm.pcr_value(await client.ask(tpm.pcr_read(10))) != bytes(32)
        assert manager.workers.zygote_pid != zygote


@in_trio
async def test_a_full_disk_loses_nothing_that_was_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with fleet(tmp_path) as manager:
        _, client = await _with_data(manager, "one")
        vault = manager._machines["one"]._vault
        assert vault is not None

        def fail(_name: str, _blob: bytes) -> None:
            raise StorageError("/full", os.strerror(errno.ENOSPC))

        with monkeypatch.context() as full:
            full.setattr(vault.blobs, "store", fail)
            code = tpm.code_of(await client.ask(tpm.nv_write(tpm.NV_INDEX, b"not any more")))
            assert code in {0x101, 0x923}  # TPM_RC_FAILURE, TPM_RC_NV_UNAVAILABLE
            assert tpm.code_of(await client.ask(tpm.pcr_read(10))) == 0x101
        await manager.reset("one")
        answer = await client.ask(tpm.nv_read(tpm.NV_INDEX, len(DATA)))
        assert tpm.nv_data(answer) == DATA


@in_trio
async def test_what_is_on_the_disk_outlives_the_manager(tmp_path: Path) -> None:
    async with fleet(tmp_path) as manager:
        _, client = await _with_data(manager, "one")
        await manager.hibernate("one")
        await manager.update("one", labels=(("vm", "7"),))
        before = await manager.describe("one")
    assert await client.at_end()
    assert not (tmp_path / "run" / "tpm" / "one").exists()
    async with fleet(tmp_path) as manager:
        (after,) = await manager.list()
        assert (after.id, after.labels, after.state) == (before.id, (("vm", "7"),), "stopped")
        client = await Client.of(await manager.start("one"))
        answer = await client.ask(tpm.nv_read(tpm.NV_INDEX, len(DATA)))
        assert tpm.nv_data(answer) == DATA
        assert tpm.pcr_value(await client.ask(tpm.pcr_read(10))) == bytes(32)


@pytest.mark.parametrize("damage", [None, b"another key of 32 byte that fits", b"short"])
@in_trio
async def test_a_key_is_where_it_was_and_nowhere_else(tmp_path: Path, damage: bytes | None) -> None:
    file = tmp_path / "key"
    file.write_bytes(secret := os.urandom(32))
    key = KeySource(str(file), mode="aes-256-cbc", format="binary")
    async with fleet(tmp_path) as manager:
        assert (await manager.create(Spec("one", UID, key=key))).encrypted
        await manager.clone("one", "two")
    for name in ("one", "two"):
        folder = tmp_path / "state" / name
        assert secret not in (folder / "tpm.json").read_bytes()
        blob = (folder / "state" / "tpm2-00.permall").read_bytes()
        assert b"\xab\x36\x47\x23" not in blob
        header, body = split_header_untrusted(blob)
        assert header.flags == BlobFlag.ENCRYPTED | BlobFlag.KEY_256BIT
        plain = Key(secret).unseal_untrusted(BlobTag.ENCRYPTED_DATA, BlobTag.IV_DATA, body)
        assert is_payload("permall", plain)
    async with fleet(tmp_path) as manager:
        client = await Client.of(await manager.start("one"))
        assert tpm.code_of(await client.ask(tpm.get_random(8))) == 0
        await manager.stop("one")
        file.unlink()
        if damage is not None:
            file.write_bytes(damage)
        said = "HMAC" if damage and len(damage) == len(secret) else f"its key {file}: "
        with pytest.raises(FleetError, match=said) as refused:
            await manager.start("one")
        assert refused.value.fault == "KeyRejected"
        with pytest.raises(FleetError) as refused:
            await manager.create(Spec("three", UID, key=key._replace(mode="rot13")))
        assert refused.value.fault == "KeyRejected"
        file.write_bytes(secret)
        assert (await manager.start("one")).state in {"awake", "asleep"}


@in_trio
async def test_a_tpm_goes_to_another_manager_as_it_is(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("00" * 16)
    async with fleet(tmp_path / "here") as manager, fleet(tmp_path / "there") as other:
        _, _ = await _with_data(manager, "one")
        with pytest.raises(FleetError, match="awake"):
            await manager.export("one")
        await manager.stop("one")
        bundle = await manager.export("one")
        refusals: dict[str, tuple[Manager, Bundle]] = {
            "TpmExists": (manager, bundle._replace(spec=bundle.spec._replace(name="two"))),
            "BadName": (other, bundle._replace(spec=bundle.spec._replace(name="../one"))),
            "StateDamaged": (other, bundle._replace(state=bundle.state[:-1])),
            "KeyRejected": (
                other,
                bundle._replace(spec=bundle.spec._replace(key=KeySource(str(key)))),
            ),
        }
        for fault, (asked, wrong) in refusals.items():
            with pytest.raises(FleetError) as refused:
                await asked.take_in(wrong)
            assert refused.value.fault == fault
        assert await other.list() == []
        assert os.listdir(tmp_path / "there" / "state") == [".lock"]
        taken = await other.take_in(bundle)
        assert (taken.id, taken.state) == (bundle.id, "stopped")
        client = await Client.of(await other.start("one"))
        answer = await client.ask(tpm.nv_read(tpm.NV_INDEX, len(DATA)))
        assert tpm.nv_data(answer) == DATA


@in_trio
async def test_it_ends_while_a_worker_is_being_made(tmp_path: Path) -> None:
    with trio.fail_after(PATIENCE_SECONDS):
        async with fleet(tmp_path) as manager:
            zygote = manager.workers.zygote_pid
            assert zygote is not None
            os.kill(zygote, signal.SIGSTOP)
            (await manager.workers.take()).end()  # from now on one is wanted
            await trio.testing.wait_all_tasks_blocked()
    with pytest.raises(ChannelError, match="closed"):
        await manager.workers.take()


@in_trio
async def test_copies_names_and_limits(tmp_path: Path) -> None:
    async with fleet(tmp_path, limits=Limits(tpms=2)) as manager:
        _, client = await _with_data(manager, "one")
        with pytest.raises(FleetError, match="awake") as refused:
            await manager.snapshot("one", "before")
        assert refused.value.fault == "Busy"
        await manager.stop("one")
        assert await client.at_end()
        await manager.snapshot("one", "before")
        client = await Client.of(await manager.start("one"))
        assert tpm.code_of(await client.ask(tpm.nv_write(tpm.NV_INDEX, DATA[::-1]))) == 0
        await manager.stop("one")
        await manager.restore("one", "before")
        await manager.update("one", new_name="first")
        client = await Client.of(await manager.start("first"))
        answer = await client.ask(tpm.nv_read(tpm.NV_INDEX, len(DATA)))
        assert tpm.nv_data(answer) == DATA
        await manager.clone("first", "second")
        refusals: dict[str, Callable[[], Awaitable[object]]] = {
            "OverLimit": lambda: manager.create(Spec("third", UID)),
            "TpmExists": lambda: manager.clone("first", "first"),
            "NoSuchTpm": lambda: manager.start("one"),
            "BadName": lambda: manager.create(Spec("../one", UID)),
            "Busy": lambda: manager.remove("first"),
        }
        for fault, asked in refusals.items():
            with pytest.raises(FleetError) as refused:
                await asked()
            assert refused.value.fault == fault
        await manager.remove("first", force=True)
        assert [one.name for one in await manager.list()] == ["second"]
        assert sorted(os.listdir(tmp_path / "state")) == [".lock", "second"]


@in_trio
async def test_copies_have_room_until_their_owner_has_none(tmp_path: Path) -> None:
    async with fleet(tmp_path, limits=Limits(bytes=6000)) as manager:
        await manager.create(Spec("one", UID))
        await manager.create(Spec("other", UID + 1))
        made = 0

        async def fill() -> None:
            nonlocal made
            while made < 9:
                await manager.snapshot("one", f"s{made}")
                made += 1

        with pytest.raises(FleetError, match="bytes with their snapshots") as refused:
            await fill()
        assert refused.value.fault == "OverLimit"
        assert made == len(os.listdir(tmp_path / "state" / "one" / "snapshots")) > 0
        with pytest.raises(FleetError, match="bytes with their snapshots"):
            await manager.create(Spec("two", UID))
        await manager.snapshot("other", "s")
        told = [note.text for note in await manager.logs("one")]
        assert told == ["created", *(f"snapshot s{number} was made" for number in range(made))]
        await manager.remove("one")
        await manager.create(Spec("one", UID))
        assert [note.text for note in await manager.logs("one")] == ["created"]


@in_trio
async def test_a_tpm_has_certificates_if_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "swtpm-localca.conf").write_text(
        f"statedir = {tmp_path}/ca\nsigningkey = {tmp_path}/ca/key.pem\n"
        f"issuercert = {tmp_path}/ca/cert.pem\ncertserial = {tmp_path}/ca/serial\n"
    )
    (tmp_path / "swtpm_setup.conf").write_text(
        "create_certs_tool = swtpm_localca\n"
        f"create_certs_tool_config = {tmp_path}/swtpm-localca.conf\nactive_pcr_banks = sha256\n"
    )
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    async with fleet(tmp_path, pool=1) as manager:
        # One that is made while it is waited for, and one of the pool's.
        for name in ("one", "two"):
            made = await manager.create(Spec(name, UID, manufactured=True))
            client = await Client.of(await manager.start(name))
            read = await client.ask(tpm.nv_read(0x01C00002, 512))  # of the RSA endorsement key
            assert made.id.encode() in tpm.nv_data(read)
            await filled(manager.pool, 1)
        assert sorted(os.listdir(tmp_path / "state")) == [".lock", "one", "two"]
