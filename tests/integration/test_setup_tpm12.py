"""A TPM 1.2 that swtpm_setup made, beside one of the C suite's: seen by IBM's and our own eyes."""

from __future__ import annotations

import hashlib
import hmac
import re
import struct
from typing import TYPE_CHECKING

import pytest
from cryptography import x509

from tests.support import sockets
from tests.support.commands import code_of, tpm12, tpm12_nv_data, tpm12_nv_read
from tests.support.setups import OURS, PEER, Word, Workshop
from tests.support.sockets import Server

if TYPE_CHECKING:
    from pathlib import Path

BOTH = pytest.mark.parametrize("maker", [OURS, PEER])
EK_INDEX, PLATFORM_INDEX = 0x1000F000, 0x1000F002
CERTIFICATES = ("--create-ek-cert", "--create-platform-cert")


def set_up(workshop: Workshop, maker: str, *words: Word) -> tuple[Path, list[str]]:
    """The state, and what was said: without times, calls of programs and the peer's socket."""
    state = workshop.new_state(f"state-{'ours' if maker == OURS else 'peer'}")
    run = workshop.run(maker, "--tpm-state", state, *words)
    assert run.returncode == 0, run.stdout + run.stderr
    rows = run.stdout.splitlines()
    unlike = re.compile("Starting|Ending|  Invoking|TPM is listening|swtpm_localca: Creating")
    return state, [row for row in rows if not unlike.match(row)]


def other(maker: str) -> tuple[str, ...]:
    """The TPM is served by the other suite than set it up."""
    return ("/usr/bin/swtpm",) if maker == OURS else sockets.OURS


def test_same_steps_as_the_peer(workshop: Workshop) -> None:
    words = (*CERTIFICATES, "--take-ownership", "--lock-nvram")
    said = [set_up(workshop, maker, *words)[1] for maker in (OURS, PEER)]
    assert said[0] == said[1]
    assert said[0][-1] == "Successfully authored TPM state."
    assert len(said[0]) == 8


@BOTH
def test_certificates_in_nv_are_for_the_key_of_the_tpm(workshop: Workshop, maker: str) -> None:
    files = workshop.new_state("files")
    words = ("--write-ek-cert-files", files, "--vmid", "vm1", *CERTIFICATES)
    state, _ = set_up(workshop, maker, *words)
    with (
        Server(
            workshop.path / "run", *sockets.RUNNING, tpm2=False, state=state, program=other(maker)
        ) as server,
        server.data() as client,
    ):
        # TPM_ReadPubek: before there is an owner everybody may; the modulus is behind its size.
        answer = client.command(tpm12(0x7C, bytes(20)))
        assert code_of(answer) == 0
        modulus = answer[10 + 24 + 4 : 10 + 24 + 4 + 256]
        found = []
        for index in (EK_INDEX, PLATFORM_INDEX):
            size = nv_size(client.command(capability_of(index)))
            stored = tpm12_nv_data(client.command(tpm12_nv_read(index, size)))
            assert stored[:3] == b"\x10\x01\x00"
            assert struct.unpack(">HH", stored[3:7]) == (size - 5, 0x1002)
            found.append(stored[7:])
    keys = [x509.load_der_x509_certificate(data).public_key() for data in found]
    for key in keys:
        numbers = key.public_numbers()  # type: ignore[union-attr]
        assert numbers.n == int.from_bytes(modulus, "big")  # type: ignore[union-attr]
    assert {path.name: path.read_bytes() for path in files.iterdir()} == {
        "ek-rsa2048.crt": found[0]
    }


def capability_of(index: int) -> bytes:
    """TPM_GetCapability(TPM_CAP_NV_INDEX): a TPM_NV_DATA_PUBLIC."""
    return tpm12(0x65, struct.pack(">III", 0x11, 4, index))


def nv_size(response: bytes) -> int:
    """dataSize, the last field."""
    assert code_of(response) == 0, response.hex()
    return int.from_bytes(response[-4:], "big")


@BOTH
@pytest.mark.parametrize(
    ("words", "password"),
    [([], b"ooo"), (["--ownerpass", "x y"], b"x y"), (["--owner-well-known"], bytes(20))],
)
def test_the_owner_is_who_knows_the_password(
    workshop: Workshop, maker: str, words: list[str], password: bytes
) -> None:
    """TPM_OwnerReadInternalPub of the EK answers the owner and nobody else."""
    state, said = set_up(workshop, maker, "--take-ownership", *words)
    assert "Successfully took ownership of the TPM." in said
    with (
        Server(
            workshop.path / "run", *sockets.RUNNING, tpm2=False, state=state, program=other(maker)
        ) as server,
        server.data() as client,
    ):
        for secret, code in ((password, 0), (b"another", 1)):
            opened = client.command(tpm12(0x0A))
            handle, nonce_even = opened[10:14], opened[14:34]
            body = struct.pack(">I", 0x40000006)  # TPM_KH_EK
            digest = hashlib.sha1(struct.pack(">I", 0x81) + body, usedforsecurity=False).digest()
            key = hashlib.sha1(secret, usedforsecurity=False).digest()
            odd = bytes(20)
            proof = hmac.digest(key, digest + nonce_even + odd + b"\0", "sha1")
            message = body + handle + odd + b"\0" + proof
            command = struct.pack(">HII", 0x00C2, 10 + len(message), 0x81) + message
            assert code_of(client.command(command)) == code


def test_nothing_but_what_was_asked_for(workshop: Workshop) -> None:
    """Without options there is no endorsement key; the TPM is enabled and active as the peer's."""
    flags: list[str] = []
    for maker in (OURS, PEER):
        state, _ = set_up(workshop, maker)
        with (
            Server(
                workshop.path / f"run-{len(flags)}", *sockets.RUNNING, tpm2=False, state=state
            ) as server,
            server.data() as client,
        ):
            assert code_of(client.command(tpm12(0x7C, bytes(20)))) == 0x23  # TPM_NO_ENDORSEMENT
            asked = tpm12(0x65, struct.pack(">III", 4, 4, 0x108))
            flags.append(client.command(asked)[10:].hex())
    assert flags[0] == flags[1]
