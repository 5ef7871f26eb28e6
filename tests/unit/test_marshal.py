"""Structures of no fixed size: the bytes that specification and peer have, and hostile ones."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtpm_cuse.errors import TpmError, WireError
from vtpm_cuse.manufacture.plan import KeyAlgorithm
from vtpm_cuse.manufacture.templates import (
    IAK,
    IDEVID,
    ek_template,
    identity_template,
    spk_template,
)
from vtpm_cuse.wire import tpm2, tpm12
from vtpm_cuse.wire.tpm import TpmCc

# As the C suite sends it, recorded with strace.
ECC_EK = (
    "80020000006f000001314000000b0000000940000009000000000000040000000000460023000c000600f20030"
    "b26e7d28d11a50bc53d882bcf5fd3a1a074148bb35d3b4e4cb1c0ad9bde419cacb47ba09699646150f9fc000f3f80e12"
    "00100010000400100000000000000000"
    "0000"
)


def test_a_whole_command_is_the_peers() -> None:
    template = ek_template(KeyAlgorithm.P384, allow_signing=True, decryption=True)
    parameters = tpm2.CreatePrimaryParameters(tpm2.SensitiveCreate().pack(), template.pack())
    made = tpm2.command(
        TpmCc.TPM_CC_CreatePrimary,
        (tpm2.TPM_RH_ENDORSEMENT,),
        parameters,
        tpm2.PasswordSession(),
    )
    assert made.hex() == ECC_EK[: 2 * 0x6F]
    assert len(made) == 0x6F


@pytest.mark.parametrize(
    ("algorithm", "flags", "size", "attributes"),
    [
        (KeyAlgorithm.RSA2048, "", 314, "000300b2"),
        (KeyAlgorithm.RSA2048, "decryption", 314, "000300b2"),
        (KeyAlgorithm.RSA2048, "allow_signing", 310, "000400b2"),
        (KeyAlgorithm.RSA2048, "allow_signing decryption", 310, "000600b2"),
        (KeyAlgorithm.RSA3072, "", 74, "000300f2"),
        (KeyAlgorithm.RSA3072, "allow_signing", 70, "000400f2"),
        (KeyAlgorithm.RSA4096, "", 74, "000300f2"),
        (KeyAlgorithm.P256, "", 122, "000300b2"),
        (KeyAlgorithm.P384, "", 74, "000300f2"),
        (KeyAlgorithm.P521, "", 90, "000300f2"),
    ],
)
def test_templates_of_endorsement_keys(
    algorithm: KeyAlgorithm, flags: str, size: int, attributes: str
) -> None:
    template = ek_template(algorithm, **dict.fromkeys(flags.split(), True)).pack()
    assert (len(template), template[4:8].hex()) == (size, attributes)


@pytest.mark.parametrize(
    ("algorithm", "sizes"),
    [
        (KeyAlgorithm.P256, (59, 62)),
        (KeyAlgorithm.P384, (75, 78)),
        (KeyAlgorithm.P521, (91, 94)),
        (KeyAlgorithm.RSA2048, (59, 60)),
        (KeyAlgorithm.RSA3072, (75, 76)),
        (KeyAlgorithm.RSA4096, (75, 76)),
    ],
)
def test_templates_of_identity_keys(algorithm: KeyAlgorithm, sizes: tuple[int, int]) -> None:
    """Attestation is restricted and has its scheme; an RSA key for identity has none."""
    made = [identity_template(identity, algorithm).pack() for identity in (IAK, IDEVID)]
    assert tuple(map(len, made)) == sizes
    assert [template[4:8].hex() for template in made] == ["000500f2", "000400f2"]
    assert b"IAK" in made[0]
    assert b"IDEVID" in made[1]


@pytest.mark.parametrize(
    "template",
    [
        ek_template(KeyAlgorithm.RSA2048),
        ek_template(KeyAlgorithm.P384),
        spk_template(KeyAlgorithm.RSA2048),
        spk_template(KeyAlgorithm.P384),
        identity_template(IAK, KeyAlgorithm.RSA3072),
        identity_template(IDEVID, KeyAlgorithm.P521),
    ],
)
def test_public_areas_come_back(template: tpm2.Public) -> None:
    data = template.pack()
    assert tpm2.read_public_untrusted(data) == template
    with pytest.raises(WireError):
        tpm2.read_public_untrusted(data[:-1])
    with pytest.raises(WireError):
        tpm2.read_public_untrusted(data + b"\0")


def test_a_response_is_cut_up() -> None:
    response = bytes.fromhex("8002 00000019 00000000 80000001 00000002 abcd 0000 00 0000")
    assert tpm2.read_response_untrusted("X", response, handles=1) == ((0x80000001,), b"\xab\xcd")
    with pytest.raises(TpmError, match="X failed: 0x101"):
        tpm2.read_response_untrusted("X", bytes.fromhex("80010000000a00000101"))


@pytest.mark.parametrize("cut", range(0x19))
def test_a_response_cut_short(cut: int) -> None:
    response = bytes.fromhex("8002 00000019 00000000 80000001 00000002 abcd 0000 00 0000")
    with pytest.raises(WireError):
        tpm2.read_response_untrusted("X", response[:cut], handles=1)


READERS = [
    tpm2.read_public_untrusted,
    tpm2.CreatePrimaryResult.unpack_untrusted,
    tpm2.PcrCapability.unpack_untrusted,
    tpm2.PcrAllocateResult.unpack_untrusted,
    tpm12.CreateEndorsementKeyPairResult.unpack_untrusted,
    tpm12.OiapResult.unpack_untrusted,
    tpm12.read_permanent_flags_untrusted,
]


@given(data=st.binary(max_size=200))
def test_hostile_bytes_are_refused_and_nothing_worse(data: bytes) -> None:
    for read in READERS:
        with contextlib.suppress(WireError):
            read(data)
    for prefix in (b"\0\1", b"\0\x23"):
        with contextlib.suppress(WireError):
            tpm2.read_public_untrusted(prefix + data)


def test_a_count_beyond_the_bytes_is_refused_at_once() -> None:
    with pytest.raises(WireError):
        tpm2.PcrCapability.unpack_untrusted(bytes.fromhex("00 00000005 ffffffff 000b 03 ffffff"))
