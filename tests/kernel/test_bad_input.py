"""Nonsense through every door of the device: it answers, lives on, and keeps its state."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import itertools
import os
import struct
from typing import TYPE_CHECKING

import pytest

from tests.kernel.harness import (
    LIBC,
    PTM_CANCEL_TPM_CMD,
    PTM_GET_CAPABILITY,
    PTM_GET_CONFIG,
    PTM_GET_INFO,
    PTM_GET_STATEBLOB,
    PTM_GET_TPMESTABLISHED,
    PTM_HASH_DATA,
    PTM_HASH_END,
    PTM_HASH_START,
    PTM_INIT,
    PTM_LOCK_STORAGE,
    PTM_RESET_TPMESTABLISHED,
    PTM_SET_BUFFERSIZE,
    PTM_SET_DATAFD,
    PTM_SET_LOCALITY,
    PTM_SET_STATEBLOB,
    PTM_SHUTDOWN,
    PTM_STOP,
    PTM_STORE_VOLATILE,
    errno_from,
    opened,
    ptm,
    ptm_result,
    seeded,
    u32,
    wait_readable,
)
from tests.support.commands import (
    NV_INDEX,
    TPM2_READ_CLOCK,
    TPM2_STARTUP_CLEAR,
    TPM2_STARTUP_STATE,
    code_of,
    get_random,
    nv_data,
    nv_define,
    nv_read,
    nv_write,
    pcr_extend,
    pcr_read,
    tpm2,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.kernel.conftest import Serve
    from tests.kernel.harness import Server

pytestmark = pytest.mark.usefixtures("warm")

CONTENTS = b"what must survive"
CALLS = (
    *(PTM_GET_CAPABILITY, PTM_INIT, PTM_GET_TPMESTABLISHED, PTM_SET_LOCALITY, PTM_HASH_START),
    *(PTM_HASH_DATA, PTM_HASH_END, PTM_CANCEL_TPM_CMD, PTM_STORE_VOLATILE),
    *(PTM_RESET_TPMESTABLISHED, PTM_GET_STATEBLOB, PTM_SET_STATEBLOB, PTM_STOP, PTM_GET_CONFIG),
    *(PTM_SET_BUFFERSIZE, PTM_GET_INFO, PTM_LOCK_STORAGE),
)
"""All but PTM_SHUTDOWN, which does what it says."""


@pytest.fixture(scope="module")
def server(module_serve: Serve) -> Server:
    server = module_serve("vtpmjunk").start()
    with opened(server.device) as fd:
        assert code_of(ask(fd, nv_define(NV_INDEX, len(CONTENTS)))) == 0
        assert code_of(ask(fd, nv_write(NV_INDEX, CONTENTS))) == 0
    return server


@pytest.fixture
def fd(server: Server) -> Iterator[int]:
    """Running and fresh before, alive and with its state after."""
    pid = server.pid
    with opened(server.device) as fd:
        reset(fd)
        yield fd
        assert code_of(ask(fd, get_random(8))) in {0, 0x100, 0x101}
        reset(fd)
        assert code_of(ask(fd, get_random(8))) == 0
        assert nv_data(ask(fd, nv_read(NV_INDEX, len(CONTENTS)))) == CONTENTS
    assert server.pid == pid
    assert "Traceback" not in server.said, server.said[-3000:]


def nv_undefine(index: int) -> bytes:
    owner = bytes.fromhex("00000009400000090000000000")
    return tpm2(0x122, struct.pack(">II", 0x40000001, index) + owner, sessions=True)


def ask(fd: int, command: bytes) -> bytes:
    """A command and its response, which has the length that it says."""
    assert os.write(fd, command) == len(command)
    wait_readable(fd, 30)
    response = os.read(fd, 8192)
    assert len(response) >= 10
    assert struct.unpack_from(">I", response, 2) == (len(response),)
    return response


def reset(fd: int) -> None:
    """Two starts: the first resumes from a volatile state that somebody stored, and removes it."""
    os.read(fd, 8192)
    assert ptm_result(fd, PTM_SET_LOCALITY, bytes([0])) == 0
    for _ in range(2):
        assert ptm_result(fd, PTM_INIT, u32(1)) == 0
    assert code_of(ask(fd, TPM2_STARTUP_CLEAR)) == 0


# -- commands -----------------------------------------------------------------------------


def test_random_bytes_as_commands(fd: int) -> None:
    random = seeded(3)
    for _ in range(300):
        size = random.choice((1, 9, 10, 11, 12, 20, random.randrange(1, 4097)))
        assert code_of(ask(fd, random.randbytes(size))) != 0


def test_random_bodies_behind_a_good_header(fd: int) -> None:
    """Every command code, with a body that cannot be right."""
    random = seeded(4)
    for code in range(0x11F, 0x198):
        for tag in (0x8001, 0x8002):
            body = random.randbytes(random.randrange(80))
            header = struct.pack(">HII", tag, 10 + len(body), code)
            response = ask(fd, header + body)
            assert len(response) >= 10
    # Startup, Shutdown, SelfTest, GetRandom and the like may have liked it: no code is asserted.


def test_mutated_commands(fd: int) -> None:
    random = seeded(5)
    corpus = (
        get_random(32),
        pcr_extend(10, bytes(32)),
        pcr_read(10),
        TPM2_READ_CLOCK,
        TPM2_STARTUP_CLEAR,
        TPM2_STARTUP_STATE,
        nv_read(NV_INDEX, len(CONTENTS)),
    )
    for _ in range(300):
        command = bytearray(random.choice(corpus))
        for _ in range(random.randrange(1, 4)):
            match random.randrange(4):
                case 0:
                    command[random.randrange(len(command))] = random.randrange(256)
                case 1:
                    command[random.randrange(len(command))] ^= 1 << random.randrange(8)
                case 2:
                    del command[random.randrange(1, len(command)) :]
                case _:
                    command += random.randbytes(random.randrange(1, 40))
            if len(command) < 2:
                break
        ask(fd, bytes(command))


@pytest.mark.parametrize("cut", range(1, 12))
def test_truncated(fd: int, cut: int) -> None:
    assert code_of(ask(fd, get_random(8)[:-cut])) != 0


@pytest.mark.parametrize("said", [0, 1, 9, 10, 11, 13, 4096, 4097, 0x7FFFFFFF, 0xFFFFFFFF])
def test_wrong_length_in_the_header(fd: int, said: int) -> None:
    command = bytearray(get_random(8))
    struct.pack_into(">I", command, 2, said)
    assert code_of(ask(fd, bytes(command))) != 0


# -- ioctl numbers ------------------------------------------------------------------------

SIZES = (0, 1, 2, 3, 4, 5, 8, 12, 16, 3084, 3088, 4096, 4100, 4101, 16383)


def test_every_ioctl_number(fd: int) -> None:
    """Of type 'P', in all sizes and directions: EINVAL for all but the PTM's own."""
    own = {*CALLS, PTM_SHUTDOWN}
    tried = 0
    for number, size, direction in itertools.product(range(64), SIZES, range(4)):
        request = direction << 30 | size << 16 | ord("P") << 8 | number
        if request in own:
            continue
        tried += 1
        error = errno_from(lambda r=request: fcntl.ioctl(fd, r, bytearray(16384), True))  # type: ignore[misc]
        assert error == errno.EINVAL, hex(request)
    assert tried > 3500
    assert errno_from(lambda: ptm(fd, PTM_SET_DATAFD)) == errno.EINVAL


def test_ioctls_of_other_types(fd: int) -> None:
    random = seeded(6)
    for _ in range(300):
        request = random.getrandbits(32)
        if request >> 8 & 0xFF in {ord("P"), 0x54, 0x66, 0x58, 0x94, 0x12, 0}:
            continue  # ours, and those that the kernel handles itself
        error = errno_from(lambda r=request: fcntl.ioctl(fd, r, bytearray(16384), True))  # type: ignore[misc]
        assert error == errno.EINVAL, hex(request)


@pytest.mark.parametrize("request_number", [PTM_GET_CAPABILITY, PTM_INIT, PTM_HASH_DATA])
def test_ioctl_with_a_bad_pointer(fd: int, request_number: int) -> None:
    def call() -> None:
        if LIBC.ioctl(fd, ctypes.c_ulong(request_number), ctypes.c_void_p(16)) < 0:
            raise OSError(ctypes.get_errno(), "ioctl")

    assert errno_from(call) == errno.EFAULT


def test_random_arguments(fd: int) -> None:
    random = seeded(7)
    for _ in range(400):
        number = random.choice(CALLS)
        argument = random.randbytes(number >> 16 & 0x3FFF)
        if number == PTM_LOCK_STORAGE:
            argument = u32(random.randrange(3))
        elif random.randrange(2):
            argument = u32(*(random.choice((0, 1, 2, 3, 4, 3072, 3073)) for _ in range(3)))
        ptm(fd, number, argument[: number >> 16 & 0x3FFF])
        if random.randrange(4) == 0:  # may be taken for a blob's part or cut off its transfer
            assert errno_from(lambda: os.write(fd, get_random(8))) in {0, errno.EIO}
            assert errno_from(lambda: os.read(fd, 4096)) in {0, errno.EIO}
    errno_from(lambda: os.read(fd, 8192))


# -- requests in the wrong order ----------------------------------------------------------

INFO = struct.pack("=QII", 1, 0, 0)
PERMANENT, VOLATILE, SAVESTATE = 1, 2, 3

STOPPED = {
    "capability": (PTM_GET_CAPABILITY, b"", 0x16FFF),
    "stop": (PTM_STOP, b"", 0),
    "established": (PTM_GET_TPMESTABLISHED, b"", 0xA),
    "reset established": (PTM_RESET_TPMESTABLISHED, b"\3", 0xA),
    "locality": (PTM_SET_LOCALITY, b"\1", 0),
    "locality 5": (PTM_SET_LOCALITY, b"\5", 0x3D),
    "locality 255": (PTM_SET_LOCALITY, b"\xff", 0x3D),
    "hash start": (PTM_HASH_START, b"", 0xA),
    "hash data": (PTM_HASH_DATA, u32(4), 0xA),
    "hash end": (PTM_HASH_END, b"", 0xA),
    "cancel": (PTM_CANCEL_TPM_CMD, b"", 0xA),
    "store": (PTM_STORE_VOLATILE, b"", 0xA),
    "get blob": (PTM_GET_STATEBLOB, u32(1, PERMANENT, 0), 0xA),
    "get unknown blob": (PTM_GET_STATEBLOB, u32(1, 77, 0), 0xA),
    "set garbage": (PTM_SET_STATEBLOB, u32(0, PERMANENT, 40) + b"x" * 40, 0x3),
    "set unknown blob": (PTM_SET_STATEBLOB, u32(0, 77, 40) + b"x" * 40, 0x3),
    "set too much": (PTM_SET_STATEBLOB, u32(0, PERMANENT, 3073), 0x3),
    "config": (PTM_GET_CONFIG, b"", 0),
    "buffer query": (PTM_SET_BUFFERSIZE, u32(0), 0),
    "buffer set": (PTM_SET_BUFFERSIZE, u32(4096), 0),
    "info": (PTM_GET_INFO, INFO, 0),
    "info beyond": (PTM_GET_INFO, struct.pack("=QII", 1, 100_000, 0), 3),
    "lock": (PTM_LOCK_STORAGE, u32(2), 0),
}
RUNNING = {
    **STOPPED,
    "established": (PTM_GET_TPMESTABLISHED, b"", 0),
    "reset established": (PTM_RESET_TPMESTABLISHED, b"\3", 0),
    "reset established 0": (PTM_RESET_TPMESTABLISHED, b"\0", 0x3D),
    "reset established 9": (PTM_RESET_TPMESTABLISHED, b"\x09", 0x3D),
    "hash data": (PTM_HASH_DATA, u32(4) + b"data", 0),
    "hash too much": (PTM_HASH_DATA, u32(4097), 9),
    "hash far too much": (PTM_HASH_DATA, u32(0xFFFFFFFF), 9),
    "hash end": (PTM_HASH_END, b"", 0),
    "hash start": (PTM_HASH_START, b"", 0),
    "cancel": (PTM_CANCEL_TPM_CMD, b"", 0),
    "store": (PTM_STORE_VOLATILE, b"", 0),
    "get blob": (PTM_GET_STATEBLOB, u32(1, PERMANENT, 0), 0),
    "get blob beyond": (PTM_GET_STATEBLOB, u32(1, PERMANENT, 1 << 31), 0),
    "get unknown blob": (PTM_GET_STATEBLOB, u32(1, 77, 0), 9),
    "get savestate": (PTM_GET_STATEBLOB, u32(1, SAVESTATE, 0), 0x800),
    "set garbage": (PTM_SET_STATEBLOB, u32(0, PERMANENT, 40) + b"x" * 40, 0xA),
    "set unknown blob": (PTM_SET_STATEBLOB, u32(0, 77, 40) + b"x" * 40, 0xA),
    "set too much": (PTM_SET_STATEBLOB, u32(0, PERMANENT, 3073), 0xA),
    "buffer set": (PTM_SET_BUFFERSIZE, u32(4096), 0xA),
}


@pytest.mark.parametrize("name", STOPPED)
def test_request_to_a_stopped_tpm(fd: int, name: str) -> None:
    assert ptm_result(fd, PTM_STOP) == 0
    number, argument, expected = STOPPED[name]
    assert ptm_result(fd, number, argument) == expected


@pytest.mark.parametrize("name", [name for name in RUNNING if name != "stop"])
def test_request_to_a_running_tpm(fd: int, name: str) -> None:
    number, argument, expected = RUNNING[name]
    assert ptm_result(fd, number, argument) == expected


# -- state blobs in pieces ----------------------------------------------------------------


def test_write_while_a_blob_is_read(fd: int) -> None:
    """EIO, and commands work again."""
    ptm(fd, PTM_GET_STATEBLOB, u32(1, VOLATILE, 0))
    assert len(os.read(fd, 100)) == 100
    assert errno_from(lambda: os.write(fd, get_random(8))) == errno.EIO
    assert code_of(ask(fd, get_random(8))) == 0


def test_blob_by_read(fd: int) -> None:
    """The rest after the first ioctl; a short read is the last."""
    answer = ptm(fd, PTM_GET_STATEBLOB, u32(1, VOLATILE, 0))
    result, _, total, length = struct.unpack_from("=4I", answer)
    assert (result, length) == (0, 3072)
    rest = b""
    while part := os.read(fd, 1000):
        rest += part
        if len(part) < 1000:
            break
    assert len(rest) == total - 3072
    assert os.read(fd, 1000) == b""
    assert code_of(ask(fd, get_random(8))) == 0


def test_offset_zero_takes_a_new_snapshot(fd: int) -> None:
    """Within one open; the parts behind it belong together."""
    request = u32(1, PERMANENT, 0)
    first = ptm(fd, PTM_GET_STATEBLOB, request)
    assert ptm(fd, PTM_GET_STATEBLOB, request) == first
    os.read(fd, 8192)
    assert code_of(ask(fd, nv_define(NV_INDEX + 1, 8))) == 0
    try:
        assert ptm(fd, PTM_GET_STATEBLOB, request) != first
        os.read(fd, 8192)
    finally:
        assert code_of(ask(fd, nv_undefine(NV_INDEX + 1))) == 0


def test_read_while_a_blob_is_written(fd: int) -> None:
    ptm_result(fd, PTM_STOP)
    assert ptm_result(fd, PTM_SET_STATEBLOB, u32(0, PERMANENT, 0)) == 0
    assert os.write(fd, b"a part") == 6
    assert errno_from(lambda: os.read(fd, 100)) == errno.EIO
    assert ask(fd, get_random(8)).hex() == "80010000000a00000101"


def test_blob_without_end(fd: int) -> None:
    """No TPM state is larger than half a MiB: EFBIG, and back to commands as after any error."""
    ptm_result(fd, PTM_STOP)
    assert ptm_result(fd, PTM_SET_STATEBLOB, u32(0, PERMANENT, 0)) == 0
    part = bytes(60_000)
    for _ in range(8):
        assert os.write(fd, part) == len(part)
    assert errno_from(lambda: os.write(fd, part)) == errno.EFBIG
    assert ask(fd, get_random(8)).hex() == "80010000000a00000101"


def test_blob_given_up_by_close(server: Server) -> None:
    with opened(server.device) as fd:
        ptm_result(fd, PTM_STOP)
        assert ptm_result(fd, PTM_SET_STATEBLOB, u32(0, PERMANENT, 0)) == 0
        os.write(fd, b"a part")
    with opened(server.device) as fd:
        reset(fd)
        assert code_of(ask(fd, get_random(8))) == 0


def test_blob_that_changes_its_type(fd: int) -> None:
    ptm_result(fd, PTM_STOP)
    assert ptm_result(fd, PTM_SET_STATEBLOB, u32(0, PERMANENT, 3072) + bytes(3072)) == 0
    assert ptm_result(fd, PTM_SET_STATEBLOB, u32(0, VOLATILE, 10) + bytes(10)) != 0
    assert ptm_result(fd, PTM_INIT) == 0


# -- afterwards ---------------------------------------------------------------------------


def test_state_is_intact_after_all_that(server: Server) -> None:
    """Runs last: the same process as at first, and its state in a new one."""
    server.stop()
    server.start()
    with opened(server.device) as fd:
        assert nv_data(ask(fd, nv_read(NV_INDEX, len(CONTENTS)))) == CONTENTS
