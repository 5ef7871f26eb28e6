"""A TPM moves from one CUSE device to another; both have the state's folder, as on a shared disk."""

from __future__ import annotations

import errno
import os
import struct
from typing import TYPE_CHECKING, Final

import pytest

from tests.kernel.harness import (
    PTM_GET_STATEBLOB,
    PTM_INIT,
    PTM_SET_STATEBLOB,
    Server,
    errno_from,
    exchange,
    opened,
    ptm,
    ptm_result,
    u32,
)
from tests.support import sockets as s
from tests.support.commands import code_of, get_random, pcr_extend, pcr_read, pcr_value

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.kernel.conftest import Serve

pytestmark = pytest.mark.usefixtures("warm")

PERMANENT, VOLATILE, SAVESTATE = 1, 2, 3
PART: Final = 3072
OUTGOING: Final = ("--migration", "release-lock-outgoing")
NOT_THERE: Final = 0x800
RETRIED_LATER: Final = 0x1F


def by_ioctl(fd: int, kind: int) -> bytes:
    blob, total = b"", 1
    while len(blob) < total:
        answer = ptm(fd, PTM_GET_STATEBLOB, u32(0, kind, len(blob)))
        result, _, total, length = struct.unpack_from("=4I", answer)
        assert result == 0
        blob += answer[16 : 16 + length]
    return blob


def by_read(fd: int, kind: int) -> bytes:
    answer = ptm(fd, PTM_GET_STATEBLOB, u32(0, kind, 0))
    result, _, _, length = struct.unpack_from("=4I", answer)
    assert result == 0
    blob = answer[16 : 16 + length]
    while part := os.read(fd, 1000):
        blob += part
    return blob


def give(fd: int, kind: int, blob: bytes) -> int:
    """A part that is not full ends it."""
    result = 0
    for start in range(0, len(blob) + 1, PART):
        part = blob[start : start + PART]
        result = ptm_result(fd, PTM_SET_STATEBLOB, u32(0, kind, len(part)) + part)
    return result


def take_last(fd: int) -> int:
    """Asks for the blob that a TPM 2.0 never has, which is the last all the same."""
    return ptm_result(fd, PTM_GET_STATEBLOB, u32(0, SAVESTATE, 0))


@pytest.mark.parametrize("take", [by_ioctl, by_read])
def test_a_tpm_moves_from_device_to_device(take: Callable[[int, int], bytes], serve: Serve) -> None:
    source = serve("vtpmfrom", more=OUTGOING).start()
    with opened(source.device) as fd:
        assert code_of(exchange(fd, pcr_extend(16, b"\x11" * 32))) == 0
        value = pcr_value(exchange(fd, pcr_read(16)))
    target = serve("vtpmto", flags="", state=source.state, more=("--migration", "incoming"))
    target.start()
    with opened(source.device) as fd, opened(target.device) as to:
        blobs = {kind: take(fd, kind) for kind in (PERMANENT, VOLATILE)}
        assert give(to, PERMANENT, blobs[PERMANENT]) == RETRIED_LATER, "the source has the lock"
        assert s.is_locked(source.state)
        assert take_last(fd) == NOT_THERE
        assert not s.is_locked(source.state)
        for kind, blob in blobs.items():
            assert give(to, kind, blob) == 0
        assert ptm_result(to, PTM_INIT) == 0
        assert pcr_value(exchange(to, pcr_read(16))) == value
    source.kill()


@pytest.mark.parametrize("more", [OUTGOING, ()], ids=["released", "kept"])
def test_lock_goes_with_the_last_blob_only_if_that_is_wanted(
    more: tuple[str, ...], serve: Serve
) -> None:
    """And a command takes it back, where the migration came to nothing."""
    server: Server = serve("vtpmfrom", more=more).start()
    with opened(server.device) as fd:
        by_ioctl(fd, PERMANENT)
        assert s.is_locked(server.state)
        assert take_last(fd) == NOT_THERE
        assert s.is_locked(server.state) is not bool(more)
        assert code_of(exchange(fd, get_random(8))) == 0
        assert s.is_locked(server.state)


def test_who_has_lost_the_state_ends_and_says_so(serve: Serve) -> None:
    source = serve("vtpmfrom", more=OUTGOING).start()
    target = serve("vtpmto", flags="", state=source.state, more=("--migration", "incoming"))
    target.start()
    with opened(source.device) as fd, opened(target.device) as to:
        blobs = {kind: by_ioctl(fd, kind) for kind in (PERMANENT, VOLATILE)}
        take_last(fd)
        for kind, blob in blobs.items():
            assert give(to, kind, blob) == 0
        assert ptm_result(to, PTM_INIT) == 0
        permanent = source.permall.read_bytes()
        assert errno_from(lambda: exchange(fd, get_random(8))) in {
            errno.ENOTCONN,
            errno.ECONNABORTED,
        }
    source.gone()
    assert source.permall.read_bytes() == permanent
