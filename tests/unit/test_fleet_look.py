"""What a TPM of a manager says of itself to others than its clients: only if that costs nobody."""

from __future__ import annotations

import os
import socket
import struct
from typing import TYPE_CHECKING

import pytest
import trio

from tests.support import commands as tpm
from tests.support import sockets as s
from tests.support.auditor import Auditor
from tests.support.fleet import Client, fleet, in_trio, started
from tests.support.fleet_devices import fake_opener
from vtpm_cuse.errors import FleetError
from vtpm_cuse.wire.tpm2 import TpmaNv

if TYPE_CHECKING:
    from pathlib import Path

    from vtpm_cuse.fleet.base import Interface
    from vtpm_cuse.fleet.manager.manager import Manager

_CERTIFICATE = bytes(range(256)) * 5
_PINS = 0x90
"""TPM_NT_PIN_PASS: each attempt to read counts."""
_EK_INDEX = 0x01C00002
_WORLD = TpmaNv.AUTHREAD | TpmaNv.NO_DA | TpmaNv.OWNERREAD | 2
"""Anybody may read it, and the owner write."""


def defined(attributes: int, size: int = len(_CERTIFICATE)) -> bytes:
    """TPM2_NV_DefineSpace of where the certificate is."""
    public = struct.pack(">IHIHH", _EK_INDEX, 0xB, attributes, 0, size)
    area = bytes.fromhex("00000009 40000009 0000 00 0000 0000")
    body = struct.pack(">I", 0x40000001) + area + struct.pack(">H", len(public)) + public
    return tpm.tpm2(0x12A, body, sessions=True)


def written(data: bytes, offset: int) -> bytes:
    """TPM2_NV_Write there, by the owner."""
    body = struct.pack(">II", 0x40000001, _EK_INDEX) + bytes.fromhex(
        "00000009 40000009 0000 00 0000"
    )
    body += struct.pack(">H", len(data)) + data + struct.pack(">H", offset)
    return tpm.tpm2(0x137, body, sessions=True)


async def until_refused(manager: Manager) -> None:
    """Looks, on and on."""
    while True:
        await manager.look("one", "caps")


@in_trio
async def test_it_says_what_its_clients_would_hear(tmp_path: Path) -> None:
    async with fleet(tmp_path) as manager:
        found = await started(manager, "one")
        client = await Client.of(found)
        await client.ask(tpm.pcr_extend(10, b"1" * 32))
        value = tpm.pcr_value(await client.ask(tpm.pcr_read(10)))
        assert await manager.look("one", "pcr-sha256/10") == f"{value.hex().upper()}\n".encode()
        assert await manager.look(found.id, "tpm_version_major") == b"2\n"
        assert b"TCG version: 2.0\n" in (await manager.look("one", "caps") or b"")
        for what in ("pcr-sha256/24", "pcr-sha256/99", "pcr-sm3/0", "../caps", "", "ek.crt"):
            assert await manager.look("one", what) is None
        commands = (await manager.hibernate("one")).commands
        with pytest.raises(FleetError, match="it is asleep, and is not woken") as info:
            await manager.look("one", "caps")
        assert info.value.fault == "Busy"
        assert (await manager.describe("one")).wakes == 0
        assert (await manager.wake("one")).commands == commands
        await client.send(tpm.get_random(8)[:5])
        with pytest.raises(FleetError, match="in the middle"):
            await until_refused(manager)  # it has to come there
        await client.send(tpm.get_random(8)[5:])
        assert tpm.code_of(await client.answer()) == 0


@pytest.mark.parametrize("interface", ["socket", "cuse"])
@in_trio
async def test_no_look_and_no_reset_costs_a_worker_descriptors(
    interface: Interface, tmp_path: Path
) -> None:
    with fake_opener() as opener:
        async with fleet(tmp_path, opener) as manager:
            found = await started(manager, "one", interface=interface)
            clients = [await Client.of(found, kind) for kind in found.sockets]
            for kind, client in zip(found.sockets, clients, strict=True):  # all have been let in
                if kind == "control":
                    assert await client.control(s.GET_CAPABILITY, b"", 8)
                else:
                    assert tpm.code_of(await client.ask(tpm.get_random(8))) == 0
            await manager.look("one", "caps")
            held = len(os.listdir(f"/proc/{found.pid}/fd"))
            for _ in range(5):
                await manager.look("one", "caps")
                await manager.reset("one")
            assert (await manager.describe("one")).pid == found.pid
            # The one in reserve is taken a moment later.
            assert abs(len(os.listdir(f"/proc/{found.pid}/fd")) - held) <= 1


@in_trio
async def test_a_certificate_is_read_if_that_counts_for_nothing(tmp_path: Path) -> None:
    async with fleet(tmp_path) as manager:
        client = await Client.of(await started(manager, "one"))
        forgotten = tpm.tpm2(
            0x122,
            struct.pack(">II", 0x40000001, _EK_INDEX)
            + bytes.fromhex("00000009 40000009 0000 00 0000"),
            sessions=True,
        )
        for attributes, size, told in (
            *((_WORLD, len(_CERTIFICATE), _CERTIFICATE), (_WORLD & ~TpmaNv.NO_DA, 8, None)),
            *((_WORLD & ~TpmaNv.AUTHREAD, 8, None), (_WORLD | _PINS, 8, None)),
        ):
            assert tpm.code_of(await client.ask(defined(attributes, size))) == 0
            assert await manager.look("one", "ek.crt") is None  # nothing is in it yet
            for offset in range(0, size, 640):
                part = _CERTIFICATE[:size][offset : offset + 640]
                assert tpm.code_of(await client.ask(written(part, offset))) == 0
            assert await manager.look("one", "ek.crt") == told
            assert tpm.code_of(await client.ask(forgotten)) == 0


@in_trio
async def test_no_look_ends_an_exclusive_audit_session(tmp_path: Path) -> None:
    async with fleet(tmp_path) as manager:
        found = await started(manager, "one")
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(found.sockets["data"])

            def process(command: bytes) -> bytes:
                connection.sendall(command)
                return connection.recv(4096)

            auditor = await trio.to_thread.run_sync(Auditor, process)
            assert await trio.to_thread.run_sync(lambda: auditor.is_exclusive)
            for _ in range(2):
                with pytest.raises(FleetError, match="cannot tell now"):
                    await manager.look("one", "pcr-sha256/10")
                assert await trio.to_thread.run_sync(lambda: auditor.is_exclusive)
                await manager.hibernate("one")
                await manager.wake("one")


@in_trio
async def test_who_looks_on_and_on_keeps_it_from_no_sleep(tmp_path: Path) -> None:
    async with fleet(tmp_path, idle=0.05) as manager:
        await started(manager, "one")
        with pytest.raises(FleetError, match="it is asleep"):
            await until_refused(manager)
        assert (await manager.describe("one")).wakes == 0
