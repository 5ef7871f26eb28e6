"""The parts of a manager, without a worker of its own: messages, states, folders, liars."""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import os
import random
import socket
import tempfile
from typing import TYPE_CHECKING, Final, cast

import pytest
import trio

from tests.support.fleet import LAZY, UID, Puppet, in_trio
from tests.support.waiting import PATIENCE_SECONDS
from vtpm_cuse.config import KeySource
from vtpm_cuse.errors import (
    ChannelError,
    FleetError,
    StateDamaged,
    StateKeyRejected,
    StateLocked,
    StateMissing,
    StorageError,
)
from vtpm_cuse.fleet import lines
from vtpm_cuse.fleet.channel import Channel
from vtpm_cuse.fleet.manager.entrances import DeviceEntrance, SocketEntrance
from vtpm_cuse.fleet.manager.machine import Machine
from vtpm_cuse.fleet.manager.sleepers import Sleepers
from vtpm_cuse.fleet.manager.surroundings import Surroundings
from vtpm_cuse.fleet.messages import (
    BODY_MAX,
    Answer,
    Call,
    Inbox,
    Kind,
    Message,
    MessageHeader,
    Order,
    Report,
)
from vtpm_cuse.fleet.states.catalogue import Catalogue, Entry, check_name
from vtpm_cuse.fleet.states.vault import Vault
from vtpm_cuse.fleet.tasks import OFF, ON, RESUME, WATCH_DATA, Task
from vtpm_cuse.fleet.worker.clock import Moment
from vtpm_cuse.fleet.worker.hearing import Hearing
from vtpm_cuse.fleet.worker.saved import SavedTpm, packed, unpacked
from vtpm_cuse.fleet.worker.store import MessageStore
from vtpm_cuse.proto.control import SavedControlStream
from vtpm_cuse.proto.device import SavedDeviceSession
from vtpm_cuse.proto.places import SavedPlace
from vtpm_cuse.resmgr.saved import Left, SavedManager, SavedSessions
from vtpm_cuse.serve.connections import SavedControl, SavedData
from vtpm_cuse.serve.device import SavedDevice
from vtpm_cuse.serve.managed_sockets import SavedManaged, SavedManagedSockets
from vtpm_cuse.serve.sockets import SavedSockets
from vtpm_cuse.storage.base import PERMANENT
from vtpm_cuse.storage.keys import Key
from vtpm_cuse.vtpm.clients import Peer, SavedClient, SavedClients
from vtpm_cuse.vtpm.file import SavedBlob, SavedOpen
from vtpm_cuse.vtpm.managed import SavedManagedOpen
from vtpm_cuse.vtpm.saved import SavedVtpm
from vtpm_cuse.wire.blob import BlobFlag, BlobTag, tlv, with_header
from vtpm_cuse.wire.layout import HOST
from vtpm_cuse.wire.metrics import Histogram

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from vtpm_cuse.fleet.manager.workers import Workers

PERMALL: Final = b"\0\0\xab\x36\x47\x23" + bytes(100)
BLOB: Final = with_header(BlobFlag(0), tlv(BlobTag.DATA, PERMALL))
ENTRY: Final = Entry("6c1dd2ba-9d67-4fb1-8f4c-9a5a35d6e9f4", UID, None, False, (("a", "b"),))


# -- messages -----------------------------------------------------------------------------


@in_trio
async def test_messages_come_as_they_went_with_their_descriptors() -> None:
    ours, theirs = map(Channel, socket.socketpair())
    files = [os.open("/dev/null", os.O_RDONLY) for _ in range(300)]
    sent = [
        Message(Order.SERVE, os.urandom(300_000), 3, 7, tuple(files)),
        Message(Report.BUSY),
        Message(Call.LOAD, b"x", 1, 2**64 - 1, tuple(files[:1])),
    ]

    async def send() -> None:
        for message in sent:
            await ours.send(message)
        ours.close()

    got = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        while (message := await theirs.receive()) is not None:
            got.append(message._replace(descriptors=()))
            assert all(os.fstat(fd) == os.fstat(files[0]) for fd in message.descriptors)
            assert len(message.descriptors) == len(sent[len(got) - 1].descriptors)
            for fd in message.descriptors:
                os.close(fd)
    assert got == [message._replace(descriptors=()) for message in sent]
    theirs.close()
    for fd in files:
        os.close(fd)


@pytest.mark.parametrize(
    "header",
    [
        MessageHeader(Report.DONE, 0, 0, BODY_MAX + 1, 0),
        MessageHeader(Report.DONE, 0, 1000, 0, 0),
        MessageHeader(Report.DONE, 0, 1, 0, 0),
        MessageHeader(64, 0, 0, 0, 0),
    ],
)
def test_what_is_no_message_is_refused_at_once(header: MessageHeader) -> None:
    inbox = Inbox()
    inbox.feed(header.pack(HOST), [])
    with pytest.raises(ChannelError):
        inbox.next()


def test_every_saved_value_goes_over_as_it_is() -> None:
    place = SavedPlace(1.5, True, 0)

    def data(fd: int) -> SavedData:
        return SavedData(fd, "socket", True, b"", None, b"")

    manager = SavedManager(
        *(True, True, True, False, Left((0x80000000,), (), (0x02000001,)), b"\0\0\1\1"),
        *(64, 3, 2, 9, 8, 7),
        *((), SavedSessions(64, 1, (), 2, 3)),
    )
    clients = SavedClients(manager, (SavedClient(1, Peer("unix", "", 5, 0), 2.5, 3.5),))
    saved = SavedTpm(
        SavedSockets(
            *(10, 11, None, data(13), (data(14),)),
            (SavedControl(15, place, SavedControlStream(b"", True, False), None, None, b"", ()),),
            SavedManagedSockets(12, clients, (SavedManaged(data(16), place, 1),), None),
        ),
        SavedVtpm(
            *("held", True, bytes(range(256)) * 8, 3, 4096, b"\x80\1", False, True, None),
            (("permall", b"p"), ("savestate", None)),
            5,
        ),
        Moment(1 << 41, 1 << 60),
    )
    text, descriptors = packed(saved)
    assert descriptors == (13, 14, 15, 16)
    assert unpacked(text, (10, 11, 12, *descriptors)) == saved
    line, _, volatile = text.partition(b"\n")
    assert saved.vtpm.volatile not in text
    for wrong in (
        *(b"", b"[]", b'{"os":[]}', b'{"SavedTpm":[1,2]}', line[:-1], volatile),
        line + b"\n?" + volatile[1:],
    ):
        with pytest.raises(ChannelError):
            unpacked(wrong, (10, 11, 12, *descriptors))


def test_the_clients_of_a_device_go_over_with_their_calls() -> None:
    blob = SavedBlob(2, 0, b"blob", 1, 3, True)
    saved = SavedTpm(
        SavedDevice(
            (
                SavedDeviceSession(
                    7, ((5, 0, SavedOpen(blob, None, b"x")),), (b"read",), ((9, 5),)
                ),
                SavedDeviceSession(
                    *(8, ((6, 1, SavedManagedOpen(3, b"answer", 1.5, True)),), (), ()),
                    *(("", "\udcff"), ((7, b"text"),), 1 << 32),
                ),
            ),
            b"response",
            None,
        ),
        SavedVtpm("held", False, b"", 0, 4096, b"", False, False, None, (), 0),
        Moment(0, 0),
    )
    text, descriptors = packed(saved)
    assert descriptors == ()
    assert unpacked(text, (10, 11)) == saved


def test_only_connections_come_back_and_only_from_one_with_sockets(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, open("/dev/null", "rb") as file:
        sockets = SocketEntrance(str(tmp_path / "one"), UID)
        assert sockets.takes_back(ours.fileno())
        assert not any(map(sockets.takes_back, (*sockets.descriptors, file.fileno())))
        sockets.close()
        assert not DeviceEntrance(()).takes_back(ours.fileno())
    assert not (tmp_path / "one").exists()


# -- the state ----------------------------------------------------------------------------


def _asked(vault: Vault, call: Call, body: bytes = b"", number: int = 0) -> Message:
    return vault.answer_untrusted(Message(call, body, number=number))


def test_a_state_that_has_gone_is_no_new_tpm(tmp_path: Path) -> None:
    vault = Vault(str(tmp_path))
    vault.lock()
    answer = _asked(vault, Call.LOAD)
    assert answer.kind is Answer.FAILED
    assert b"StateDamaged" in answer.body
    with pytest.raises(StateLocked):
        Vault(str(tmp_path)).lock()
    vault.close()
    new = Vault(str(tmp_path), may_begin=True)
    assert StateMissing.__name__.encode() in _asked(new, Call.LOAD).body
    assert _asked(new, Call.STORE, BLOB).kind is Answer.DONE
    assert _asked(new, Call.LOAD).body == BLOB
    new.close()


def test_a_state_that_is_open_takes_two_descriptors(tmp_path: Path) -> None:
    gc.collect()  # what earlier tests have left may hold some
    before = os.listdir("/proc/self/fd")
    vault = Vault(str(tmp_path))
    vault.lock()
    assert len(os.listdir("/proc/self/fd")) == len(before) + 2
    vault.close()


def test_a_worker_asks_for_no_state_that_came_along_until_it_has_begun() -> None:
    ours, end = lines.line()
    ours.close()
    hearing = Hearing(end)
    store = MessageStore(hearing, BLOB)
    assert [store.load(PERMANENT), store.load(PERMANENT)] == [BLOB, BLOB]
    with pytest.raises(StorageError, match="manager"):
        store.load("volatilestate")
    store.forget()
    with pytest.raises(StorageError, match="manager"):
        store.load(PERMANENT)
    hearing.close()


@pytest.mark.parametrize(
    "lie",
    [
        Message(Call.STORE, b""),
        Message(Call.STORE, BLOB[:-1]),
        Message(Call.STORE, with_header(BlobFlag(0), tlv(BlobTag.DATA, b"another thing"))),
        Message(Call.STORE, with_header(BlobFlag(0), tlv(BlobTag.DATA, PERMALL + bytes(2 << 20)))),
        Message(Call.STORE, BLOB, number=1),
        Message(Call.DELETE),
        Message(Call.LOAD, number=3),
        Message(Call.LOAD, descriptors=(0,)),
        Message(Order.FORK),
        Message(Report.DONE),
    ],
)
def test_what_no_worker_asks_for_is_not_done(tmp_path: Path, lie: Message) -> None:
    vault = Vault(str(tmp_path), may_begin=True)
    vault.lock()
    assert _asked(vault, Call.STORE, BLOB).kind is Answer.DONE
    with pytest.raises(ChannelError):
        vault.answer_untrusted(lie)
    assert _asked(vault, Call.LOAD).body == BLOB
    _asked(vault, Call.CLOSE)
    with pytest.raises(ChannelError):
        _asked(vault, Call.STORE, BLOB)


def test_a_worker_gets_its_state_and_no_key(tmp_path: Path) -> None:
    vault = Vault(str(tmp_path), Key(secret := os.urandom(32)), may_begin=True)
    for request in (Message(Call.STORE, BLOB), Message(Call.LOAD), Message(Call.SIZES)):
        answer = vault.answer_untrusted(request)
        assert answer.kind is Answer.DONE
        assert secret not in answer.pack()
        assert request.kind is not Call.LOAD or answer.body == BLOB
    assert PERMALL not in (tmp_path / "tpm2-00.permall").read_bytes()
    vault.close()


def test_a_state_from_elsewhere_is_checked_before_it_is_kept(tmp_path: Path) -> None:
    def folder() -> str:
        return tempfile.mkdtemp(dir=tmp_path)

    def taken(key: Key | None, blob: bytes) -> bytes:
        where = folder()
        vault = Vault(where, key, may_begin=True)
        try:
            vault.begin_with_untrusted(blob)
        except StorageError:
            assert os.listdir(where) == []
            raise
        return vault.permanent()

    key = Key(bytes(32))
    origin = Vault(folder(), key, may_begin=True)
    origin.begin(PERMALL)
    sealed = origin.blobs.load("permall")
    assert PERMALL not in sealed
    assert taken(key, sealed) == taken(None, BLOB) == PERMALL
    for wrong, blob in ((None, sealed), (Key(b"1" * 32), sealed), (Key(bytes(16)), BLOB)):
        with pytest.raises(StateKeyRejected):
            taken(wrong, blob)
    other = with_header(BlobFlag(0), tlv(BlobTag.DATA, b"another thing"))
    for blob in (b"", BLOB[:-1], BLOB + b"x", other):
        with pytest.raises(StateDamaged):
            taken(None, blob)


# -- the catalogue ------------------------------------------------------------------------


@pytest.fixture
def catalogue(tmp_path: Path) -> Iterator[Catalogue]:
    """With two TPMs, one and two."""
    found = Catalogue(str(tmp_path / "state"))
    for name in ("one", "two"):
        vault = Vault(found.begin(ENTRY.id), may_begin=True)
        assert _asked(vault, Call.STORE, BLOB).kind is Answer.DONE
        vault.close()
        found.finish(name, ENTRY)
    yield found
    found.close()


@pytest.mark.parametrize(
    "damage",
    [
        *(b"", b"{", b"[]", b'{"id": 1}', b'{"x": 1}', b"[" * 60_000, None),
        *(
            json.dumps({**ENTRY._asdict(), **other}).encode()
            for other in ({"id": 1}, {"owner": -1}, {"owner": 1 << 40}, {"number": True})
        ),
        *(
            json.dumps({**ENTRY._asdict(), "key": key}).encode()
            for key in ({"file": 1}, {"fd": "3"}, {"file": "/a", "remove": "true"}, "file=/a")
        ),
    ],
)
def test_a_damaged_description_costs_no_tpm(catalogue: Catalogue, damage: bytes | None) -> None:
    path = os.path.join(catalogue.path, "one", "tpm.json")
    os.unlink(path)
    if damage is not None:
        with open(path, "wb") as file:
            file.write(damage)
    found = catalogue.entries()
    assert found["two"] == ENTRY
    assert found["one"] == Entry(found["one"].id, os.geteuid(), None, False, ())
    assert catalogue.entries() == found
    vault = Vault(catalogue.state_of("one"))
    assert _asked(vault, Call.LOAD).body == BLOB
    vault.close()


def test_what_cannot_be_read_is_left_as_it_is_and_costs_no_other(catalogue: Catalogue) -> None:
    folder = os.path.join(catalogue.path, "one")
    os.rename(os.path.join(folder, "tpm.json"), os.path.join(folder, "kept"))
    os.mkdir(os.path.join(folder, "tpm.json"))
    assert list(catalogue.entries()) == ["two"]
    assert sorted(os.listdir(folder)) == ["kept", "state", "tpm.json"]


def test_a_copied_folder_is_another_tpm(catalogue: Catalogue) -> None:
    found = catalogue.entries()  # both were made with one id
    assert (found["one"], found["two"]) == (ENTRY, ENTRY._replace(id=found["two"].id))
    assert found["two"].id != ENTRY.id
    assert catalogue.entries() == found


def test_a_description_that_would_not_be_read_is_not_written(catalogue: Catalogue) -> None:
    with pytest.raises(FleetError, match="too long"):
        catalogue.write("one", ENTRY._replace(profile="x" * (1 << 16)))
    assert catalogue.entries()["one"] == ENTRY
    key = KeySource(pwdfile="/a", kdf="sha512")
    catalogue.write("one", ENTRY._replace(key=key))
    assert catalogue.entries()["one"] == ENTRY._replace(key=key)


def test_what_a_crash_left_is_no_tpm(catalogue: Catalogue) -> None:
    catalogue.begin("half")
    os.mkdir(os.path.join(catalogue.path, "foreign"))
    assert list(catalogue.entries()) == ["one", "two"]
    assert sorted(os.listdir(catalogue.path)) == [".lock", "foreign", "one", "two"]
    with pytest.raises(StorageError):
        catalogue.rename("one", "two")
    with pytest.raises(StateLocked):
        Catalogue(catalogue.path)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-a", "a" * 65, "a\n", "ä", ".new-x"])
def test_such_names_are_refused(name: str) -> None:
    with pytest.raises(FleetError) as refused:
        check_name(name)
    assert refused.value.fault == "BadName"


# -- one TPM and what claims to be its worker ---------------------------------------------


class Stage:
    """A machine whose workers are puppets."""

    def __init__(self, catalogue: Catalogue, run: Path, nursery: trio.Nursery) -> None:
        self.puppets: list[Puppet] = []
        self.refills = 0
        self.sleepers: Sleepers[Machine] = Sleepers()
        self.one = Machine(
            "one",
            ENTRY,
            Surroundings(
                *(catalogue, cast("Workers", self), self.sleepers, nursery, str(run), LAZY),
                lambda _: None,
                Histogram(),
            ),
        )

    async def take(self) -> object:
        """As `Workers` does."""
        await trio.lowlevel.checkpoint()
        self.puppets.append(Puppet())
        return self.puppets[-1].worker

    def refill(self) -> None:
        """As `Workers` does."""
        self.refills += 1

    async def started(self, begin: Callable[[], object]) -> Puppet:
        """What the next puppet is told; it says that it serves."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(begin)  # type: ignore[arg-type]
            count = len(self.puppets)
            while len(self.puppets) == count:
                await trio.lowlevel.checkpoint()
            puppet = self.puppets[-1]
            told = await puppet.orders.receive()
            assert told is not None
            puppet.told = told
            assert self.refills == count  # another one takes a processor from this one
            await puppet.orders.send(Message(Report.SERVING))
        assert self.refills == len(self.puppets)
        return puppet


@contextlib.asynccontextmanager
async def _stage(catalogue: Catalogue, run: Path):  # type: ignore[no-untyped-def]  # noqa: ANN202
    with trio.fail_after(PATIENCE_SECONDS):
        async with trio.open_nursery() as nursery:
            stage = Stage(catalogue, run, nursery)
            try:
                yield stage
            finally:
                nursery.cancel_scope.cancel()
        for puppet in stage.puppets:
            puppet.end()
        stage.one._power_off()
        stage.sleepers.close()


@in_trio
async def test_what_was_saved_is_given_out_once(catalogue: Catalogue, tmp_path: Path) -> None:
    async with _stage(catalogue, tmp_path) as stage:
        puppet = await stage.started(stage.one.start)
        assert (puppet.told.flags, len(puppet.told.descriptors)) == (ON, 3)
        await puppet.orders.send(Message(Report.ASLEEP, b"volatile", WATCH_DATA, 5))
        await puppet.worker.ended.wait()
        assert stage.one.state == "asleep"
        puppet = await stage.started(stage.one.wake)
        assert puppet.told.flags == RESUME
        assert Task.unpack(puppet.told.body)[2:4] == (b"volatile", BLOB)
        puppet.process.kill()
        puppet.orders.close()
        await puppet.worker.ended.wait()
        assert stage.one.state == "failed"
        puppet = await stage.started(stage.one.wake_for_client)
        assert puppet.told.flags == OFF
        assert Task.unpack(puppet.told.body)[2:4] == (b"", b"")


@in_trio
async def test_what_is_no_connection_is_not_kept(catalogue: Catalogue, tmp_path: Path) -> None:
    async with _stage(catalogue, tmp_path) as stage:
        puppet = await stage.started(stage.one.start)
        nothing = os.open("/dev/null", os.O_RDONLY)
        await puppet.orders.send(Message(Report.ASLEEP, descriptors=(nothing,)))
        os.close(nothing)
        await puppet.worker.ended.wait()
        assert (stage.one.state, stage.one.described().pid) == ("failed", None)
        assert puppet.process.wait(PATIENCE_SECONDS) == -9


@in_trio
async def test_what_a_worker_says_of_its_tpm_is_bounded(
    catalogue: Catalogue, tmp_path: Path
) -> None:
    async with _stage(catalogue, tmp_path) as stage:
        puppet = await stage.started(stage.one.start)

        async def say(message: Message) -> None:
            assert await puppet.orders.receive() == Message(Order.LOOK, b"caps")
            await puppet.orders.send(message)

        for message, seen in (
            *((Message(Report.TOLD, b"x"), b"x"), (Message(Report.TOLD, b"x", errno.ENOENT), None)),
            *(
                (Message(Report.TOLD, bytes(1 << 14)), "cannot tell"),
                (Message(Report.DONE), "in the middle"),
            ),
            *(
                (Message(Report.TOLD, b"x", errno.EBUSY), "cannot tell"),
                (Message(Report.BUSY), "in the middle"),
            ),
        ):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(say, message)
                if isinstance(seen, str):
                    with pytest.raises(FleetError, match=seen) as info:
                        await stage.one.look("caps")
                    assert info.value.fault == "Busy"
                else:
                    assert await stage.one.look("caps") == seen


@pytest.mark.parametrize("seed", range(4))
@in_trio
async def test_a_worker_that_lies_is_ended_and_reaches_nobody(
    catalogue: Catalogue, tmp_path: Path, seed: int
) -> None:
    chance = random.Random(seed)  # noqa: S311
    other = _everything(os.path.join(catalogue.path, "two"))
    before = _sockets()
    async with _stage(catalogue, tmp_path) as stage:
        for _ in range(12):
            begin = stage.one.start if stage.one.state == "stopped" else stage.one._awake
            puppet = await stage.started(begin)
            for _ in range(chance.randrange(1, 6)):
                if puppet.worker.ended.is_set():
                    break
                _lie(puppet, chance)
                for _ in range(20):
                    await trio.lowlevel.checkpoint()
            puppet.end_of_orders()  # it may be in the middle of a message that seems long
            await puppet.worker.ended.wait()
            assert puppet.process.wait(PATIENCE_SECONDS) == -9
            assert stage.one.state in {"failed", "asleep", "stopped"}
    assert _everything(os.path.join(catalogue.path, "two")) == other
    assert _sockets() == before
    vault = Vault(catalogue.state_of("one"))
    assert _asked(vault, Call.LOAD).body[:30] == BLOB[:30]
    vault.close()


def _sockets() -> list[str]:
    """Those that are open here."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return sorted(name for name in found if name.startswith("socket:"))


def _lie(puppet: Puppet, chance: random.Random) -> None:
    kinds: tuple[Kind, ...] = (*Report, *Call, *Order, *Answer)
    body = chance.choice((b"", BLOB, os.urandom(chance.randrange(99)), b"{}\n"))
    message = Message(chance.choice(kinds), body, chance.randrange(9), chance.randrange(5))
    text = message.pack()
    if chance.random() < 0.2:
        text = text[: chance.randrange(len(text))] + os.urandom(9)
    calls = chance.random() < 0.5
    if chance.random() < 0.3:
        ours, theirs = socket.socketpair()
        header = MessageHeader(message.kind, 1, 2, len(body), 0).pack(HOST)
        with ours, theirs, open("/dev/null", "rb") as file, contextlib.suppress(OSError):
            end = puppet._calls if calls else puppet._orders
            socket.send_fds(end, [header + body], [ours.fileno(), file.fileno()])
        return
    puppet.send_raw(text, calls=calls)


def _everything(folder: str) -> dict[str, bytes]:
    found = {}
    for path, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(path, name), "rb") as file:
                found[os.path.join(path, name)] = file.read()
    return found
