"""What is done to a TPM that is suspended at every step, and to one that is not: the same."""

from __future__ import annotations

import random
import struct
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from tests.support import commands as tpm
from tests.support.stores import FailingStore
from vtpm_cuse.engine.libtpms import LibtpmsEngine
from vtpm_cuse.storage.sealed import SealedStore
from vtpm_cuse.vtpm.vtpm import Vtpm, VtpmOptions

if TYPE_CHECKING:
    from collections.abc import Iterator

OTHER_SIZE: Final = 3000
_PASSWORD: Final = bytes.fromhex("00000009400000090000000000")
_SEQUENCE: Final = struct.pack(">I", 0x80000000)
HASH_SEQUENCE_START: Final = tpm.tpm2(0x186, bytes.fromhex("0000000b"))
SET_LOCALITY: Final = bytes.fromhex("80010000000b20001000")


def sequence_update(data: bytes) -> bytes:
    """TPM2_SequenceUpdate of the first sequence."""
    return tpm.tpm2(
        0x15C, _SEQUENCE + _PASSWORD + struct.pack(">H", len(data)) + data, sessions=True
    )


def sequence_complete() -> bytes:
    """TPM2_SequenceComplete of the first sequence."""
    return tpm.tpm2(0x13E, _SEQUENCE + _PASSWORD + bytes.fromhex("000040000007"), sessions=True)


class Host:
    """A vTPM on the real library; `renew` suspends it and resumes another one."""

    def __init__(
        self, blobs: dict[str, bytes], *, tpm2: bool = True, options: VtpmOptions | None = None
    ) -> None:
        self.store = FailingStore()
        self.store.blobs = dict(blobs)
        self._sealed = SealedStore(self.store)
        self._tpm2 = tpm2
        self._options = options or VtpmOptions(allow_set_locality=True)
        self._between(established=False)
        self.vtpm = self._make()
        self.vtpm.buffer_size(4096)

    def _make(self) -> Vtpm:
        engine = LibtpmsEngine(tpm2=self._tpm2, nvram=self._sealed)
        return Vtpm(engine, self._sealed, self._options)

    def renew(self) -> None:
        """Nothing is left of the old one but what is stored, and what was saved."""
        established = self.vtpm.running and self.vtpm.established()
        saved = self.vtpm.suspend()
        before = dict(self.store.blobs), self.store.locked
        if saved.running:  # else the bit would be lost, as in another process
            self._between(established=not established)
        self.vtpm = self._make()
        self.vtpm.buffer_size(OTHER_SIZE)
        self.vtpm.resume(saved)
        assert (self.store.blobs, self.store.locked) == before

    def _between(self, *, established: bool) -> None:
        """Another TPM, which leaves nothing in the library as it was."""
        if not self._tpm2:  # it would take half a second
            return
        other = LibtpmsEngine(tpm2=True, nvram=SealedStore(FailingStore()))
        other.start()
        other.locality = 3
        if established:
            other.hash_start()
            other.hash_end()
        else:
            other.reset_established()
        other.stop()

    def close(self) -> None:
        """So that another one can be."""
        self.vtpm.close()

    def seen(self) -> tuple[object, ...]:
        """What else somebody might notice; blobs by their names, for they hold random numbers."""
        vtpm = self.vtpm
        return (
            *(vtpm.running, vtpm.locality, vtpm.buffer_size(0), vtpm.state_lost),
            *(vtpm.holds_lock, self.store.locked, sorted(self.store.blobs)),
        )


def prepared(*, tpm2: bool = True) -> dict[str, bytes]:
    """The blobs of a TPM that has been on once: both are to have the same seeds."""
    host = Host({}, tpm2=tpm2)
    host.vtpm.start()
    host.vtpm.process(tpm.TPM2_STARTUP_CLEAR if tpm2 else tpm.TPM12_STARTUP_CLEAR)
    host.close()
    return host.store.blobs


@contextmanager
def started(blobs: dict[str, bytes]) -> Iterator[Host]:
    """A TPM 2.0 that has these blobs, is on and started."""
    host = Host(blobs)
    host.vtpm.start()
    try:
        assert tpm.code_of(host.vtpm.process(tpm.TPM2_STARTUP_CLEAR)) == 0
        yield host
    finally:
        host.close()


def masked(command: bytes, response: bytes) -> bytes | tuple[int, int]:
    """Of random numbers only how many there are."""
    is_random = command[6:10] == tpm.get_random(1)[6:10]
    return (tpm.code_of(response), len(response)) if is_random else response


SCRIPT: Final = (
    *(tpm.TPM2_STARTUP_CLEAR, tpm.pcr_extend(10, b"1" * 32), tpm.pcr_read(10)),
    *(HASH_SEQUENCE_START, sequence_update(b"abc"), sequence_update(b"def"), sequence_complete()),
    *(tpm.nv_define(tpm.NV_INDEX, 8), tpm.nv_write(tpm.NV_INDEX, b"persists")),
    *(tpm.nv_read(tpm.NV_INDEX, 8), SET_LOCALITY + b"\3", tpm.pcr_extend(18, b"2" * 32)),
    *(tpm.pcr_read(18), SET_LOCALITY + b"\0", tpm.pcr_extend(18, b"3" * 32), tpm.pcr_read(18)),
    *(tpm.get_random(16), tpm.create_primary_rsa(bits=1024), b"", b"\x80\x01", bytes(20)),
)
"""Commands with something to lose between them."""


def command_of(chance: random.Random) -> bytes:
    """Any short command."""
    pcr, digest = chance.choice((10, 16, 17, 18, 20, 23)), bytes([chance.randrange(256)]) * 32
    return chance.choice(
        (
            *(tpm.get_random(chance.randrange(1, 48)), tpm.pcr_extend(pcr, digest)),
            *(tpm.pcr_read(pcr), tpm.nv_define(tpm.NV_INDEX, 8), tpm.nv_read(tpm.NV_INDEX, 8)),
            *(tpm.nv_write(tpm.NV_INDEX, digest[:8]), SET_LOCALITY + bytes([pcr % 7])),
            *(tpm.TPM2_STARTUP_CLEAR, tpm.TPM2_STARTUP_STATE, tpm.TPM2_SHUTDOWN_CLEAR),
            *(tpm.TPM2_SHUTDOWN_STATE, HASH_SEQUENCE_START, sequence_update(digest)),
            *(sequence_complete(), digest[:12], tpm.tpm2(0x17B, digest)),
        )
    )


def chances(seed: int, count: int) -> Iterator[random.Random]:
    """A source of chance for each step, however many numbers the ones before took."""
    for number in range(count):
        yield random.Random(seed * 1000 + number)  # noqa: S311
