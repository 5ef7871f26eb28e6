"""The firmware measures into the TPM: its log, replayed, gives the PCRs.

That is SeaBIOS, OVMF for two processors, and SLOF.

The log's format is of "TCG PC Client Platform Firmware Profile", section 10.
"""

from __future__ import annotations

import hashlib
import struct
from typing import TYPE_CHECKING, Final

import pytest

from tests.qemu.boards import POWER
from tests.qemu.facts import read_pcrs
from tests.qemu.fleet import MEASURED

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.qemu.fleet import Booted

EV_NO_ACTION: Final = 3
EV_SEPARATOR: Final = 4
ALGORITHMS: Final = {0x04: "sha1", 0x0B: "sha256", 0x0C: "sha384", 0x0D: "sha512"}
FIRMWARE_PCRS: Final = range(8)


@pytest.mark.parametrize("booted", MEASURED, indirect=True, ids=str)
def test_log_gives_the_pcrs(booted: Booted) -> None:
    shell, tpm2 = booted.machine.shell, booted.kind.tpm2
    log = shell.run("xxd -p /sys/kernel/security/tpm0/binary_bios_measurements")
    entries = list((tpm2_entries if tpm2 else tpm1_entries)(bytes.fromhex(log)))
    separated = {pcr for pcr, kind, _ in entries if kind == EV_SEPARATOR}
    # SLOF measures itself, and not a kernel that was put into memory for it.
    assert separated == (set() if booted.kind.board is POWER else set(FIRMWARE_PCRS))
    replayed: dict[str, bytes] = {}
    for pcr, kind, digests in entries:
        if kind == EV_NO_ACTION:
            continue
        for bank, digest in digests.items():
            before = replayed.get(f"{bank}/{pcr}", bytes(len(digest)))
            replayed[f"{bank}/{pcr}"] = hashlib.new(bank, before + digest).digest()
    pcrs = {name: bytes.fromhex(value) for name, value in read_pcrs(shell).items()}
    assert {name for name in pcrs if name.endswith("/0")} <= replayed.keys()
    for name, value in pcrs.items():
        if name in replayed or int(name.split("/")[1]) in FIRMWARE_PCRS:
            assert replayed.get(name, bytes(len(value))) == value, name


def tpm1_entries(log: bytes) -> Iterator[tuple[int, int, dict[str, bytes]]]:
    """PCR, kind and digests of each entry."""
    while log:
        pcr, kind, digest, size = struct.unpack_from("<II20sI", log)
        yield pcr, kind, {"sha1": digest}
        log = log[32 + size :]


def tpm2_entries(log: bytes) -> Iterator[tuple[int, int, dict[str, bytes]]]:
    """The same, of a log whose first entry is one of a TPM 1.2 and tells the banks."""
    (size,) = struct.unpack_from("<28xI", log)
    assert log[32:].startswith(b"Spec ID Event03\0")
    log = log[32 + size :]
    while log:
        pcr, kind, count = struct.unpack_from("<III", log)
        log = log[12:]
        digests = {}
        for _ in range(count):
            bank = ALGORITHMS[int.from_bytes(log[:2], "little")]
            end = 2 + hashlib.new(bank).digest_size
            digests[bank] = log[2:end]
            log = log[end:]
        yield pcr, kind, digests
        (size,) = struct.unpack_from("<I", log)
        log = log[4 + size :]
