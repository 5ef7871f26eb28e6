"""A manager leaves its place to another one: what clients of its TPMs, and its workers, see of that."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
from typing import TYPE_CHECKING, Final

import pytest
import trio
import trio.testing

from tests.support import commands as tpm
from tests.support.fleet import LAZY, UID, Client, Puppet, in_trio, started, until
from tests.support.waiting import PATIENCE_SECONDS
from vtpm_cuse.config import KeySource
from vtpm_cuse.errors import ChannelError, StateLocked
from vtpm_cuse.fleet import heritage
from vtpm_cuse.fleet.base import Spec
from vtpm_cuse.fleet.heritage import Heritage, SavedManager
from vtpm_cuse.fleet.manager import machine
from vtpm_cuse.fleet.manager.manager import Manager, Settings, managed
from vtpm_cuse.fleet.manager.pool import _Ahead
from vtpm_cuse.fleet.messages import Answer, Call, Message, Report
from vtpm_cuse.fleet.states.vault import Vault
from vtpm_cuse.wire.blob import BlobFlag, BlobTag, tlv, with_header

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

DATA: Final = b"acknowledged"
EXTENDED: Final = tpm.pcr_extend(10, b"1" * 32)
BLOB: Final = with_header(BlobFlag(0), tlv(BlobTag.DATA, b"\0\0\xab\x36\x47\x23" + bytes(100)))


class Dynasty:
    """Managers of one catalogue, one after the other; the first one has nothing left to it."""

    def __init__(self, folder: Path) -> None:
        self._settings = Settings(str(folder / "state"), str(folder / "run"), idle=LAZY, spare=0)
        self._left: Heritage | None = None

    @contextlib.asynccontextmanager
    async def manager(self, *, last: bool = False) -> AsyncIterator[Manager]:
        """The next one; it leaves all to the one behind it, unless it is the last one."""
        listener, other = socket.socketpair()
        with trio.fail_after(PATIENCE_SECONDS), listener, other:
            async with managed(self._settings, left=self._left) as manager:
                yield manager
                if not last:
                    left = await manager.leave(os.dup(listener.fileno()), own_path=False)
        if not last:
            self._left = heritage.read(heritage.written(left))
            os.close(left.manager.listener)


async def _pcr(client: Client) -> bytes:
    return tpm.pcr_value(await client.ask(tpm.pcr_read(10)))


@in_trio
async def test_clients_see_nothing_of_a_change_of_managers(tmp_path: Path) -> None:
    line = Dynasty(tmp_path)
    async with line.manager() as manager:
        (tmp_path / "key").write_bytes(bytes(32))
        await manager.create(
            Spec(
                "a", UID, key=KeySource(file=f"{tmp_path}/key", mode="aes-256-cbc", format="binary")
            )
        )
        found = [await manager.start("a"), *[await started(manager, name) for name in "bc"]]
        clients = {one.name: await Client.of(one) for one in found}
        (tmp_path / "key").unlink()
        await manager.create(Spec("off", UID))
        for client in clients.values():
            assert tpm.code_of(await client.ask(EXTENDED)) == 0
        (pid,) = {(await manager.describe("a")).pid}
        extended = await _pcr(clients["a"])
        await manager.hibernate("b")
        killed = (await manager.describe("c")).pid
        assert killed is not None
        os.kill(killed, signal.SIGKILL)
        await until(manager, "c", "failed")
        before = await manager.list()
        with pytest.raises(StateLocked):
            Vault(manager._catalogue.state_of("b")).lock()
        await clients["a"].send(tpm.create_primary_rsa())  # in the middle of it
        for _ in range(2):
            await trio.lowlevel.checkpoint()
    # Nobody is there; what a client wants of the disk now waits for the next one.
    assert tpm.code_of(await clients["a"].answer()) == 0
    await clients["a"].send(tpm.nv_define(tpm.NV_INDEX, len(DATA)))
    await clients["b"].send(tpm.pcr_read(10))
    async with line.manager() as manager:
        assert tpm.code_of(await clients["a"].answer()) == 0
        assert tpm.pcr_value(await clients["b"].answer()) == extended
        await manager.wake("b")  # it has answered, and may not be known to be awake yet
        now = await manager.list()
        assert [(one.id, one.sockets, one.labels) for one in now] == [
            (one.id, one.sockets, one.labels) for one in before
        ]
        assert [one.state for one in now] == ["awake", "awake", "failed", "stopped"]
        assert (now[0].pid, now[2].failure) == (pid, before[2].failure)
        assert now[1].wakes == 1
        with pytest.raises(StateLocked):
            Vault(manager._catalogue.state_of("a")).lock()
        await manager.hibernate("a")
    async with line.manager(last=True) as manager:
        assert await _pcr(clients["a"]) == extended
        assert (await manager.reset("c")).state == "awake"
        late = await Client.of(await manager.describe("c"))
        assert await _pcr(late) == bytes(32)
        for name in "abc":
            await manager.remove(name, force=True)
        assert os.listdir(tmp_path / "run" / "tpm") == []


@in_trio
async def test_all_that_was_held_is_held_once(tmp_path: Path) -> None:
    """Descriptors do not become more from one manager to the next."""
    line = Dynasty(tmp_path)
    counts = []
    async with line.manager() as manager:
        client = await Client.of(await started(manager, "one"))
        assert tpm.code_of(await client.ask(EXTENDED)) == 0  # it has been let in
    for number in range(3):
        async with line.manager(last=number == 2) as manager:
            await manager.hibernate("one")
            counts.append(_held())
            assert tpm.code_of(await client.ask(EXTENDED)) == 0
    assert len(set(counts)) == 1


@in_trio
async def test_who_is_about_to_wake_a_tpm_finds_that_it_has_left(tmp_path: Path) -> None:
    line = Dynasty(tmp_path)

    async def have_turn(manager: Manager, task_status: trio.TaskStatus[None]) -> None:
        one = manager._machines["one"]
        async with one.turn:
            task_status.started()
            await trio.testing.wait_all_tasks_blocked()  # until the manager wants to leave
            manager._nursery.start_soon(one.wake_for_client)
            await trio.testing.wait_all_tasks_blocked()

    async with line.manager() as manager:
        client = await Client.of(await started(manager, "one"))
        assert tpm.code_of(await client.ask(EXTENDED)) == 0
        await manager.hibernate("one")
        await manager._nursery.start(have_turn, manager)
    async with line.manager(last=True) as manager:
        assert (await manager.describe("one")).wakes == 0
        assert await _pcr(client) != bytes(32)


def _held() -> int:
    """Sockets, processes and files in memory; a folder may be open or not."""
    gc.collect()  # what earlier tests have left may hold some
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return sum(name.startswith(("socket:", "anon_inode:", "/memfd:")) for name in found)


async def _puppet(manager: Manager, monkeypatch: pytest.MonkeyPatch) -> Puppet:
    """Serves a TPM called one."""
    with monkeypatch.context() as changed:
        changed.setattr(_Ahead, "fill", lambda _: None)  # or it would be asked to make one
        await manager.create(Spec("one", UID))
    puppet = Puppet()

    async def take() -> object:
        await trio.lowlevel.checkpoint()
        return puppet.worker

    async with trio.open_nursery() as nursery:
        with monkeypatch.context() as changed:
            changed.setattr(manager.workers, "take", take)
            nursery.start_soon(manager.start, "one")
            told = await puppet.orders.receive()
        assert told is not None
        puppet.told = told
        await puppet.orders.send(Message(Report.SERVING))
    return puppet


@in_trio
async def test_what_has_come_in_part_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = Dynasty(tmp_path)
    store, asleep = Message(Call.STORE, BLOB), Message(Report.ASLEEP, b"volatile")
    ours, theirs = trio.socket.socketpair()
    client = Client(ours)
    async with line.manager() as manager:
        puppet = await _puppet(manager, monkeypatch)
        text = asleep._replace(descriptors=(theirs.fileno(),)).pack()
        socket.send_fds(puppet._orders, [text[:5]], [theirs.fileno()])
        theirs.close()
        puppet.send_raw(store.pack()[:20], calls=True)
        await trio.testing.wait_all_tasks_blocked()
    puppet.send_raw(store.pack()[20:], calls=True)
    async with line.manager(last=True) as manager:
        answer = await puppet.calls.receive()
        assert answer is not None
        assert answer.kind is Answer.DONE
        puppet.send_raw(text[5:])
        await until(manager, "one", "asleep")
        machine_ = manager._machines["one"]
        assert machine_._saved is not None
        assert (machine_._saved.take(), len(machine_._connections)) == (b"volatile", 1)
        machine_._saved = None  # no worker could go on from that
        assert puppet.process.wait(PATIENCE_SECONDS) == -signal.SIGKILL
        vault = machine_._vault
        assert vault is not None
        assert vault.blobs.load("permall")[-100:] == bytes(100)
    assert await client.at_end()
    puppet.end()


@in_trio
async def test_a_worker_that_does_not_listen_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_LEAVE_SECONDS", 0.01)
    line = Dynasty(tmp_path)
    async with line.manager() as manager:
        puppet = await _puppet(manager, monkeypatch)
        puppet._calls.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                puppet._calls.send(Message(Call.LOAD).pack())
        await trio.testing.wait_all_tasks_blocked()
    async with line.manager(last=True) as manager:
        await until(manager, "one", "failed")
    assert puppet.process.wait(PATIENCE_SECONDS) == -signal.SIGKILL
    puppet.end()


@in_trio
async def test_what_could_not_go_on_does_not_begin(tmp_path: Path) -> None:
    """Another form of what is saved: nobody's volatile state is spent on a process that cannot."""
    line = Dynasty(tmp_path)
    async with line.manager(last=True) as manager:
        client = await Client.of(await started(manager, "one"))
        assert tpm.code_of(await client.ask(EXTENDED)) == 0
        await manager.hibernate("one")
        zygote = manager.workers.zygote_pid
        with pytest.MonkeyPatch.context() as changed:
            changed.setattr(manager.workers, "_form", b"of an earlier version")
            with pytest.raises(ChannelError, match="stop the manager"):
                await manager.workers.renew()
        assert manager.workers.zygote_pid == zygote
        assert await _pcr(client) != bytes(32)


@pytest.mark.parametrize("data", [b"", b"{}", b"[]\n", b"\xff\n", b'{"SavedManager":["x"]}\n'])
def test_what_is_no_heritage_is_refused(data: bytes) -> None:
    fd = os.memfd_create("heritage")
    os.write(fd, data)
    with pytest.raises(ChannelError):
        heritage.read(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_program_that_cannot_be_replaced_has_all_its_descriptors(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("sys.executable", str(tmp_path / "none"))
    with open(tmp_path / "lock", "wb") as file, socket.socket() as listener:
        left = Heritage(SavedManager("", file.fileno(), listener.fileno(), True, None, None), ())
        with pytest.raises(FileNotFoundError):
            heritage.bequeath(left, [])
        assert [os.get_inheritable(fd) for fd in left.descriptors()] == [False, False]
