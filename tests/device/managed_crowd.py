"""Many keys of many clients, of one process and of several: each signs with its own."""

from __future__ import annotations

import hashlib
import random
from contextlib import ExitStack
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed, encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256

from tests.kernel.harness import child, wait_child
from tests.support import managed as m
from tests.support.commands import code_of, tpm2

if TYPE_CHECKING:
    from tests.device.managed import Client, World

KEYS = 40
CLIENTS = 3
USES = 120


def create_signing_key(number: int, hierarchy: int = m.NULL) -> bytes:
    """TPM2_CreatePrimary of an ECDSA key on P-256 that *number* tells apart, without lockout."""
    sensitive = m.sized(m.sized(b"") + m.sized(b""))
    public = bytes.fromhex("0023000b 00040472 0000 0010 0018 000b 0003 0010")
    public += m.sized(m.u32(number)) + m.sized(b"")
    parameters = sensitive + m.sized(public) + m.sized(b"") + m.u32(0)
    return tpm2(0x131, m.u32(hierarchy) + m.PASSWORD + parameters, sessions=True)


def signed(client: Client, handle: int, digest: bytes) -> bytes:
    """A signature in DER by TPM2_Sign."""
    ticket = bytes.fromhex("8024 40000007 0000")
    parameters = m.sized(digest) + bytes.fromhex("0018 000b") + ticket
    response = client.command(tpm2(0x15D, m.u32(handle) + m.PASSWORD + parameters, sessions=True))
    assert code_of(response) == 0, response.hex()
    r, rest = unsized(response[18:])
    s, _ = unsized(rest)
    return encode_dss_signature(int.from_bytes(r, "big"), int.from_bytes(s, "big"))


def unsized(data: bytes) -> tuple[bytes, bytes]:
    size = int.from_bytes(data[:2], "big")
    return data[2 : 2 + size], data[2 + size :]


def public_key(response: bytes) -> ec.EllipticCurvePublicKey:
    """That of a response of TPM2_ReadPublic."""
    x, rest = unsized(response[10 + 2 + 20 :])
    y, _ = unsized(rest)
    numbers = (int.from_bytes(x, "big"), int.from_bytes(y, "big"))
    return ec.EllipticCurvePublicNumbers(*numbers, ec.SECP256R1()).public_key()


def use_many_keys(world: World[Client], clients: int, seed: int) -> None:
    """All of them loaded, used in any order; a signature fits its key and, so, no other."""
    chance = random.Random(seed)  # noqa: S311 - which key is next
    with ExitStack() as stack:
        there = [stack.enter_context(world.client()) for _ in range(clients)]
        keys = []
        for number in range(KEYS):
            for place, client in enumerate(there):
                made = client.command(create_signing_key(number << 16 | place << 8 | seed))
                handle = m.handle_of(made)
                public = public_key(client.command(m.read_public(handle)))
                keys.append((client, handle, public))
        assert len({public.public_numbers() for _, _, public in keys}) == KEYS * clients
        for number in range(USES):
            client, handle, public = chance.choice(keys)
            digest = hashlib.sha256(m.u32(number)).digest()
            signature = signed(client, handle, digest)
            public.verify(signature, digest, ec.ECDSA(Prehashed(SHA256())))


def test_many_keys_of_one_process(world: World[Client]) -> None:
    use_many_keys(world, CLIENTS, 0)


def test_many_keys_of_several_processes(world: World[Client]) -> None:
    with ExitStack() as stack:
        pids = [
            stack.enter_context(child(lambda seed=seed: use_many_keys(world, 1, seed)))  # type: ignore[misc]
            for seed in range(1, 1 + CLIENTS)
        ]
        assert [wait_child(pid) for pid in pids] == [0] * CLIENTS
