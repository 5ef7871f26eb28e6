"""A FUSE mount in memory: what a client sees of the folder, its texts and the device in it."""

from __future__ import annotations

import errno
import json
import os
import stat
import struct
from typing import TYPE_CHECKING, Final

import pytest

from tests.support import ptm
from tests.support.engine import echo
from tests.support.kernel import (
    INTERRUPT,
    IOCTL,
    OPEN,
    POLL,
    READ,
    RELEASE,
    FakeKernel,
    Machine,
    Reply,
)
from vtpm_cuse.errors import FrontendError
from vtpm_cuse.proto.fuse import FileOwnership, FuseSession, init_reply
from vtpm_cuse.vtpm.attributes import TpmAttributes, is_attribute

if TYPE_CHECKING:
    from vtpm_cuse.vtpm.file import SavedOpen

LOOKUP, FORGET, GETATTR, SETATTR, STATFS, OPENDIR, READDIR = 1, 2, 3, 4, 17, 27, 28
WRITE, GETXATTR, RELEASEDIR, BATCH_FORGET = 16, 22, 29, 42
ROOT, DEVICE = 1, 2
LONG: Final = bytes.fromhex("80010000000a00000131")
RANDOM: Final = bytes.fromhex("80010000000c0000017b0008")
SHUTDOWN: Final = bytes.fromhex("80010000000c000001450000")


def answer(tag: str, *parts: str) -> bytes:
    """A successful response."""
    body = bytes.fromhex("".join(parts))
    return bytes.fromhex(tag) + struct.pack(">II", 10 + len(body), 0) + body


BANKS: Final = answer("8001", "00 00000005 00000002", "0004 03 000000", "000b 03 ffffff")


def pcr_read(command: bytes, value: str = "abcd") -> bytes:
    bank = command[14:16].hex()
    return answer("8001", "00000014 00000001", bank, "03 010000", "00000001 0002", value)


class Mount(Machine):
    """A mount of ``vtpm0``, whose TPM knows two banks of which one is active."""

    def __init__(self, *, tpm2: bool = True) -> None:
        super().__init__(tpm2=tpm2)
        self.engine.script[0x17A] = BANKS
        self.engine.script[0x17E] = pcr_read

    def make_session(self) -> FuseSession[SavedOpen]:
        texts = TpmAttributes(self.vtpm, self.file, lambda: b"a line\n", {"pid": 7})
        return FuseSession({"vtpm0": self.file}, texts, FileOwnership(1000, 100, 0o600, 1234567))

    def at(self, node: int) -> FakeKernel:
        self.kernel.node = node
        return self.kernel

    def lookup(self, name: str, folder: int = ROOT) -> int:
        """The node of a name; minus the errno."""
        reply = self.at(folder).call(LOOKUP, name.encode() + b"\0", out_size=128)
        assert reply.error or len(reply.body) == 128
        return -reply.error or int(struct.unpack_from("=Q", reply.body)[0])

    def node(self, path: str) -> int:
        node = ROOT
        for name in path.split("/"):
            node = self.lookup(name, node)
            assert node > 0, path
        return node

    def open(self, path: str, flags: int = os.O_RDONLY) -> tuple[int, int]:
        """Descriptor and errno."""
        reply = self.at(self.node(path)).call(OPEN, struct.pack("=II", flags, 0), out_size=16)
        return (0, reply.error) if reply.error else (struct.unpack_from("=Q", reply.body)[0], 0)

    def start_read(self, path: str, fh: int, offset: int = 0, size: int = 4096) -> int:
        body = struct.pack("=QQIIQII", fh, offset, size, 0, 0, 0, 0)
        return self.at(self.node(path)).send(READ, body, out_size=size)

    def text(self, path: str) -> str:
        """As cat shows it."""
        fh, error = self.open(path)
        assert error == 0
        reply = self.kernel.result(self.start_read(path, fh))
        assert reply is not None
        assert reply.error == 0, reply
        return reply.body.decode()

    def list(self, folder: int, size: int = 4096) -> list[tuple[str, int]]:
        """Names and types, read in pieces of *size*."""
        found: list[tuple[str, int]] = []
        offset = 0
        while True:
            body = struct.pack("=QQIIQII", 0, offset, size, 0, 0, 0, 0)
            listing = self.at(folder).call(READDIR, body, out_size=size).body
            if not listing:
                return found
            while listing:
                _, offset, length, kind = struct.unpack_from("=QQII", listing)
                found.append((listing[24 : 24 + length].decode(), kind))
                listing = listing[(24 + length + 7) // 8 * 8 :]


TOP = ["vtpm0", "tpm_version_major", "caps", "durations", "timeouts", "log", "status"]


@pytest.fixture
def mount() -> Mount:
    return Mount()


# -- the tree -----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [48, 64, 4096])
def test_listing(mount: Mount, size: int) -> None:
    dots = [(".", 4), ("..", 4)]
    assert mount.list(ROOT, size) == [*dots, *((name, 8) for name in TOP), ("pcr-sha256", 4)]
    bank = mount.node("pcr-sha256")
    assert mount.list(bank, size) == [*dots, *((str(index), 8) for index in range(24))]


def test_every_listed_name_is_found(mount: Mount) -> None:
    for name, _ in mount.list(ROOT)[2:]:
        assert mount.lookup(name) > 0
        assert name == "vtpm0" or is_attribute(name)
    assert mount.lookup("vtpm0") == DEVICE
    assert mount.lookup("nothing") == -errno.ENOENT
    assert mount.lookup("pcr-sha1") == -errno.ENOENT  # not active
    assert mount.lookup("24", mount.node("pcr-sha256")) == -errno.ENOENT
    assert mount.lookup("caps", mount.node("pcr-sha256")) == -errno.ENOENT


@pytest.mark.parametrize(
    ("path", "mode", "size"),
    [
        ("vtpm0", stat.S_IFREG | 0o600, 0),
        ("caps", stat.S_IFREG | 0o444, 4096),
        ("log", stat.S_IFREG | 0o444, 7),
        ("pcr-sha256", stat.S_IFDIR | 0o555, 0),
        ("pcr-sha256/7", stat.S_IFREG | 0o444, 4096),
    ],
)
def test_stat(mount: Mount, path: str, mode: int, size: int) -> None:
    node = mount.node(path)
    body = mount.at(node).call(GETATTR, bytes(16), out_size=104).body
    ino, found, _, _, mtime = struct.unpack_from("=QQQQQ", body, 16)
    assert (ino, found, mtime) == (node, size, 1234567)
    assert struct.unpack_from("=IIII", body, 16 + 60) == (
        mode,
        2 if size == 0 and mode & 0o40000 else 1,
        1000,
        100,
    )


def test_node_that_never_was(mount: Mount) -> None:
    for opcode in (GETATTR, OPEN, READ, READDIR):
        for node in (0, 9999):
            assert mount.at(node).call(opcode, bytes(40)).error == errno.ENOENT


def test_nothing_can_be_changed(mount: Mount) -> None:
    for opcode in (SETATTR, 6, 8, 9, 10, 11, 12, 13, 35, 45):
        assert mount.at(ROOT).call(opcode, bytes(100)).error == errno.EPERM
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDWR | os.O_TRUNC):
        assert mount.open("caps", flags) == (0, errno.EACCES)
    assert mount.at(mount.node("caps")).call(WRITE, bytes(40)).error == errno.EPERM


def test_forget_has_no_reply(mount: Mount) -> None:
    for opcode in (FORGET, BATCH_FORGET):
        assert mount.kernel.result(mount.at(ROOT).send(opcode, bytes(8))) is None


def test_the_rest(mount: Mount) -> None:
    assert len(mount.at(ROOT).call(STATFS, b"").body) == 80
    assert mount.at(ROOT).call(OPENDIR, bytes(8)).error == 0
    assert mount.at(ROOT).call(RELEASEDIR, bytes(24)).error == 0
    assert mount.at(ROOT).call(GETXATTR, bytes(16)).error == errno.ENOSYS


# -- texts --------------------------------------------------------------------------------


def test_texts(mount: Mount) -> None:
    assert mount.text("tpm_version_major") == "2\n"
    assert mount.text("pcr-sha256/0") == "ABCD\n"
    assert mount.text("log") == "a line\n"
    assert json.loads(mount.text("status")) == {
        "pid": 7,
        "tpm_version": "2.0",
        "running": True,
        "open": False,
        "busy": False,
        "locality": 0,
    }


def test_what_the_tpm_is_asked(mount: Mount) -> None:
    mount.text("pcr-sha256/23")
    assert mount.engine.commands[-1].hex() == "8001000000140000017e00000001000b03000080"
    mount.list(ROOT)
    assert mount.engine.commands[-1].hex() == "8001000000160000017a000000050000000000000001"
    properties = {
        "00000105": answer("8001", "00 00000006 00000001 00000105 49424d00"),
        "0000010b": answer("8001", "00 00000006 00000001 0000010b 00090002"),
    }
    asked = []

    def capability(command: bytes) -> bytes:
        which = command[14:18].hex()
        asked.append(command.hex())
        return properties.get(which, BANKS)

    mount.engine.script[0x17A] = capability
    assert mount.text("caps") == (
        "Manufacturer: 0x49424d00\nTCG version: 2.0\nFirmware version: 9.2\n"
    )
    assert asked[-2:] == [
        "8001000000160000017a000000060000010500000001",
        "8001000000160000017a000000060000010b00000001",
    ]


def test_text_in_pieces_is_one_snapshot(mount: Mount) -> None:
    fh, _ = mount.open("pcr-sha256/0")

    def part(offset: int, size: int) -> bytes:
        reply = mount.kernel.result(mount.start_read("pcr-sha256/0", fh, offset, size))
        assert reply is not None
        return reply.body

    assert part(0, 2) == b"AB"
    mount.engine.script[0x17E] = lambda command: pcr_read(command, "1122")
    assert part(2, 100) == b"CD\n"
    assert part(5, 100) == b""
    assert part(0, 100) == b"1122\n"
    mount.at(mount.node("pcr-sha256/0")).call(RELEASE, struct.pack("=QIIQ", fh, 0, 0, 0))


def test_texts_and_nodes_outlive_a_suspension(mount: Mount) -> None:
    fh, _ = mount.open("pcr-sha256/0")
    waits = mount.start_read("pcr-sha256/0", fh, 0, 2)
    assert mount.kernel.result(waits) == Reply(0, b"AB")
    node = mount.node("caps")
    saved = mount.session.suspend()
    mount.session = mount.kernel.session = mount.make_session()
    mount.session.resume(saved)
    mount.engine.script[0x17E] = lambda command: pcr_read(command, "1122")
    waits = mount.start_read("pcr-sha256/0", fh, 2, 100)
    assert mount.kernel.result(waits) == Reply(0, b"CD\n")
    reply = mount.at(node).call(OPEN, struct.pack("=II", os.O_RDONLY, 0), out_size=16)
    assert struct.unpack_from("=Q", reply.body)[0] == fh + 1


def test_text_does_not_disturb_a_client(mount: Mount) -> None:
    device = mount.at(DEVICE)
    assert device.open().error == 0
    assert device.write(RANDOM).error == 0
    mount.engine.locality = 3
    mount.text("pcr-sha256/0")
    assert mount.engine.localities[-1] == 0
    assert mount.engine.locality == 3
    assert mount.at(DEVICE).read(10).body == echo(RANDOM)[:10]
    mount.text("tpm_version_major")
    assert mount.at(DEVICE).read().body == echo(RANDOM)[10:]


def test_text_does_not_hide_a_shutdown(mount: Mount) -> None:
    """The TPM2_Shutdown of a client is the last command, whatever was read since."""
    device = mount.at(DEVICE)
    device.open()
    device.write(SHUTDOWN)
    mount.text("pcr-sha256/0")
    mount.engine.calls.clear()
    mount.vtpm.stop()
    assert mount.engine.calls == ["stop"]


def test_text_waits_for_a_long_command(mount: Mount) -> None:
    fh, _ = mount.open("pcr-sha256/0")
    mount.at(DEVICE).open()
    mount.at(DEVICE).write(LONG)
    asked = len(mount.engine.commands)
    unique = mount.start_read("pcr-sha256/0", fh)
    assert mount.text("log") == "a line\n"
    assert json.loads(mount.text("status"))["busy"] is True
    assert mount.kernel.result(unique) is None
    assert len(mount.engine.commands) == asked
    mount.jobs.run()
    reply = mount.kernel.result(unique)
    assert reply is not None
    assert reply.body == b"ABCD\n"


def test_waiting_text_can_be_interrupted(mount: Mount) -> None:
    fh, _ = mount.open("caps")
    mount.at(DEVICE).open()
    mount.at(DEVICE).write(LONG)
    unique = mount.start_read("caps", fh)
    mount.kernel.interrupt(unique)
    reply = mount.kernel.result(unique)
    assert reply is not None
    assert reply.error == errno.EINTR
    mount.jobs.run()
    assert mount.kernel.result(unique) is None


def errno_of_read(mount: Mount, path: str) -> int:
    fh, _ = mount.open(path)
    reply = mount.kernel.result(mount.start_read(path, fh))
    assert reply is not None
    return reply.error


def test_text_of_a_tpm_that_is_off(mount: Mount) -> None:
    mount.text("pcr-sha256/0")
    mount.vtpm.stop()
    assert errno_of_read(mount, "pcr-sha256/0") == errno.EIO
    assert errno_of_read(mount, "caps") == errno.EIO
    assert mount.text("tpm_version_major") == "2\n"
    assert json.loads(mount.text("status"))["running"] is False
    assert ("pcr-sha256", 4) in mount.list(ROOT)


NO_BANK = answer("8001", "00000014 00000001 000b 03 000000 00000000")


@pytest.mark.parametrize(
    "bad", [b"", bytes(9), bytes.fromhex("80010000000a00000100"), BANKS, BANKS[:-1], NO_BANK]
)
def test_text_from_a_bad_answer(mount: Mount, bad: bytes) -> None:
    mount.text("pcr-sha256/0")
    mount.engine.script[0x17E] = mount.engine.script[0x17A] = bad
    assert errno_of_read(mount, "pcr-sha256/0") in {errno.EIO, errno.EINVAL, errno.ENOENT}
    assert ("pcr-sha256", 4) in mount.list(ROOT)


def test_no_text_while_the_state_is_handed_out(mount: Mount) -> None:
    mount.text("pcr-sha256/0")
    mount.vtpm.release_storage()
    locks = mount.store.locks
    assert errno_of_read(mount, "pcr-sha256/0") == errno.EBUSY
    assert mount.store.locks == locks


def test_no_text_in_a_measurement(mount: Mount) -> None:
    mount.at(DEVICE).open()
    mount.text("pcr-sha256/0")
    mount.at(DEVICE).ioctl(ptm.HASH_START)
    assert errno_of_read(mount, "pcr-sha256/0") == errno.EBUSY
    mount.at(DEVICE).ioctl(ptm.HASH_END)
    assert mount.text("pcr-sha256/0") == "ABCD\n"


def test_no_text_in_a_sha1_thread() -> None:
    mount = Mount(tpm2=False)
    mount.engine.script[0x15] = answer("00c4", "5a" * 20)
    assert ("pcr-sha1", 4) in mount.list(ROOT)
    assert mount.text("pcr-sha1/3") == "5A" * 20 + "\n"
    mount.at(DEVICE).open()
    for code in ("a0", "a1"):
        mount.at(DEVICE).write(bytes.fromhex(f"00c10000000a000000{code}"))
        assert errno_of_read(mount, "pcr-sha1/3") == errno.EBUSY
    mount.at(DEVICE).write(bytes.fromhex("00c10000000a000000a2"))
    assert mount.text("pcr-sha1/3") == "5A" * 20 + "\n"


def test_texts_of_a_tpm12() -> None:
    mount = Mount(tpm2=False)

    def capability(command: bytes) -> bytes:
        values = {
            "00000005 00000004 00000103": "00000004 49424d00",
            "00000005 00000004 00000115": "00000010 000f4240 001e8480 002dc6c0 003d0900",
            "00000005 00000004 00000120": "0000000c 00000001 00000002 00000003",
            "0000001a 00000000": "0000000f 0030 0102129e 0002 03 49424d00 0000",
        }
        return answer("00c4", values[command[10:].hex(" ", -4)])

    mount.engine.script[0x65] = capability
    assert mount.text("tpm_version_major") == "1\n"
    assert mount.text("timeouts") == "1000000 2000000 3000000 4000000 [original]\n"
    assert mount.text("durations") == "1 2 3 [original]\n"
    assert mount.text("caps") == (
        "Manufacturer: 0x49424d00\nTCG version: 1.2\nFirmware version: 18.158\n"
    )


# -- poll, ioctl --------------------------------------------------------------------------


def test_poll_of_a_text_leaves_poll_of_the_device_alive(mount: Mount) -> None:
    """One ENOSYS and the kernel would never ask again, for no file of the mount."""
    caps = mount.node("caps")
    body = struct.pack("=QQII", 1, 0, 0, 0xFFFF)
    assert struct.unpack("=II", mount.at(caps).call(POLL, body).body)[0] & 1
    ioctl = struct.pack("=QIIQII", 1, 0, 0x5401, 0, 0, 0)
    assert mount.at(caps).call(IOCTL, ioctl).error == errno.ENOTTY
    mount.at(DEVICE).open()
    assert mount.at(DEVICE).poll() & 4


def test_interrupt_of_the_device(mount: Mount) -> None:
    mount.at(DEVICE).open()
    mount.at(DEVICE).write(LONG)
    unique = mount.at(DEVICE).start_read()
    # The kernel names the node of the request.
    mount.at(DEVICE).send(INTERRUPT, struct.pack("=Q", unique))
    reply = mount.kernel.result(unique)
    assert reply is not None
    assert reply.error == errno.EINTR


# -- INIT ---------------------------------------------------------------------------------


def init_message(body: bytes, opcode: int = 26) -> memoryview:
    return memoryview(FakeKernel.message(opcode, 2, body))


@pytest.mark.parametrize(("offered", "taken"), [(0xFFFFFFFF, 8), (8, 8), (0xFFFFFFF7, 0)])
def test_init(offered: int, taken: int) -> None:
    reply = init_reply(init_message(struct.pack("=IIII", 7, 38, 4096, offered) + bytes(48)))
    assert struct.unpack_from("=IiQ", reply) == (16 + 64, 0, 2)
    assert struct.unpack_from("=IIIIHHI", reply, 16) == (7, 38, 4096, taken, 0, 0, 65536)


@pytest.mark.parametrize(
    ("body", "opcode"),
    [(b"", 26), (struct.pack("=IIII", 7, 38, 0, 0), 4096), (struct.pack("=IIII", 8, 1, 0, 0), 26)],
)
def test_no_init(body: bytes, opcode: int) -> None:
    with pytest.raises(FrontendError):
        init_reply(init_message(body, opcode))


@pytest.mark.parametrize("opcode", range(60))
def test_short_requests_end(opcode: int) -> None:
    """Whatever comes, of whatever length: one reply, and no exception."""
    without = {FORGET, BATCH_FORGET, INTERRUPT}
    for node in (ROOT, DEVICE):
        for size in range(40):
            mount = Mount()
            reply = mount.kernel.result(mount.at(node).send(opcode, bytes(size)))
            assert reply is not None or opcode in without
