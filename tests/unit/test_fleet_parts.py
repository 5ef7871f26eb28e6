"""The parts of a manager, without a worker of its own: messages, states, folders, liars."""

from __future__ import annotations

import gc
import json
import os
import socket
import tempfile
from typing import TYPE_CHECKING

import pytest
import trio

from tests.support.fleet import UID, in_trio
from tests.support.liars import BLOB, ENTRY, PERMALL, asked, catalogue_of_two
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
from vtpm_cuse.fleet.messages import (
    BODY_MAX,
    Answer,
    Call,
    Inbox,
    Message,
    MessageHeader,
    Order,
    Report,
)
from vtpm_cuse.fleet.states.catalogue import Catalogue, Entry, check_name
from vtpm_cuse.fleet.states.vault import Vault
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

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


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
    others = socket.socket(), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs, others[0], others[1], open("/dev/null", "rb") as file:
        sockets = SocketEntrance(str(tmp_path / "one"), UID)
        assert sockets.takes_back(ours.fileno())
        # One of the network may linger: who closes it waits.
        wrong = (*sockets.descriptors, *(one.fileno() for one in (file, *others)))
        assert not any(map(sockets.takes_back, wrong))
        assert all(map(os.fstat, (ours.fileno(), *wrong)))
        sockets.close()
        assert not DeviceEntrance(()).takes_back(ours.fileno())
    assert not (tmp_path / "one").exists()


# -- the state ----------------------------------------------------------------------------


def test_a_state_that_has_gone_is_no_new_tpm(tmp_path: Path) -> None:
    vault = Vault(str(tmp_path))
    vault.lock()
    answer = asked(vault, Call.LOAD)
    assert answer.kind is Answer.FAILED
    assert b"StateDamaged" in answer.body
    with pytest.raises(StateLocked):
        Vault(str(tmp_path)).lock()
    vault.close()
    new = Vault(str(tmp_path), may_begin=True)
    assert StateMissing.__name__.encode() in asked(new, Call.LOAD).body
    assert asked(new, Call.STORE, BLOB).kind is Answer.DONE
    assert asked(new, Call.LOAD).body == BLOB
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
    assert asked(vault, Call.STORE, BLOB).kind is Answer.DONE
    with pytest.raises(ChannelError):
        vault.answer_untrusted(lie)
    assert asked(vault, Call.LOAD).body == BLOB
    asked(vault, Call.CLOSE)
    with pytest.raises(ChannelError):
        asked(vault, Call.STORE, BLOB)


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
    with catalogue_of_two(tmp_path / "state") as found:
        yield found


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
    assert asked(vault, Call.LOAD).body == BLOB
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
