"""Structures of no fixed size: the bytes that specification and peer have, and hostile ones."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtpm_cuse.errors import TpmError, WireError
from vtpm_cuse.manufacture.plan import SetupPlan
from vtpm_cuse.manufacture.tpm2 import ecc_ek_template, rsa_ek_template, spk_template
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
    plan = SetupPlan(tpm2=True, allow_signing=True, decryption=True)
    parameters = tpm2.CreatePrimaryParameters(
        tpm2.SensitiveCreate().pack(), ecc_ek_template(plan).pack()
    )
    made = tpm2.command(
        TpmCc.TPM_CC_CreatePrimary,
        (tpm2.TPM_RH_ENDORSEMENT,),
        parameters,
        tpm2.PasswordSession(),
    )
    assert made.hex() == ECC_EK[: 2 * 0x6F]
    assert len(made) == 0x6F


@pytest.mark.parametrize(
    ("plan", "size", "attributes"),
    [
        (SetupPlan(tpm2=True), 314, "000300b2"),
        (SetupPlan(tpm2=True, decryption=True), 314, "000300b2"),
        (SetupPlan(tpm2=True, allow_signing=True), 310, "000400b2"),
        (SetupPlan(tpm2=True, allow_signing=True, decryption=True), 310, "000600b2"),
        (SetupPlan(tpm2=True, rsa_bits=3072), 74, "000300f2"),
        (SetupPlan(tpm2=True, rsa_bits=3072, allow_signing=True), 70, "000400f2"),
    ],
)
def test_templates_of_rsa_endorsement_keys(plan: SetupPlan, size: int, attributes: str) -> None:
    template = rsa_ek_template(plan).pack()
    assert (len(template), template[4:8].hex()) == (size, attributes)


@pytest.mark.parametrize(
    "template",
    [
        rsa_ek_template(SetupPlan(tpm2=True)),
        ecc_ek_template(SetupPlan(tpm2=True)),
        spk_template(SetupPlan(tpm2=True, spk="rsa")),
        spk_template(SetupPlan(tpm2=True, spk="ecc")),
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
