"""TPM headers and the few commands the server makes itself, as literal bytes."""

import pytest

from vtpm_cuse.errors import WireError
from vtpm_cuse.wire.tpm import (
    TpmRc,
    TpmSu,
    command_code,
    long_commands,
    response,
    response_code,
    shutdown_command,
    startup_command,
)


@pytest.mark.parametrize(
    ("kind", "tpm2", "expected"),
    [
        (TpmSu.TPM_SU_CLEAR, True, "80010000000c000001440000"),
        (TpmSu.TPM_SU_STATE, True, "80010000000c000001440001"),
        (TpmSu.TPM_ST_CLEAR, False, "00c10000000c000000990001"),
        (TpmSu.TPM_ST_STATE, False, "00c10000000c000000990002"),
        (TpmSu.TPM_ST_DEACTIVATED, False, "00c10000000c000000990003"),
    ],
)
def test_startup(kind: TpmSu, tpm2: bool, expected: str) -> None:
    assert startup_command(kind, tpm2=tpm2).hex() == expected


def test_shutdown() -> None:
    assert shutdown_command(TpmSu.TPM_SU_STATE).hex() == "80010000000c000001450001"
    assert shutdown_command(TpmSu.TPM_SU_CLEAR).hex() == "80010000000c000001450000"


def test_made_responses() -> None:
    assert response(TpmRc.TPM_RC_FAILURE, tpm2=True).hex() == "80010000000a00000101"
    assert response(TpmRc.TPM_FAIL, tpm2=False).hex() == "00c40000000a00000009"


def test_response_code() -> None:
    assert response_code(bytes.fromhex("80010000000a00000909")) == 0x909
    assert response_code(memoryview(bytes.fromhex("80010000000a00000909ffff"))) == 0x909
    with pytest.raises(WireError):
        response_code(bytes(9))


@pytest.mark.parametrize("code", [0x131, 0x153, 0x191, 0x143])
def test_long_commands_of_tpm2(code: int) -> None:
    assert code.to_bytes(4, "big") in long_commands(tpm2=True)


@pytest.mark.parametrize("code", [0x0D, 0x1F, 0x78, 0x50])
def test_long_commands_of_tpm12(code: int) -> None:
    assert code.to_bytes(4, "big") in long_commands(tpm2=False)


@pytest.mark.parametrize("code", [0x17B, 0x17E, 0x182, 0x144])
def test_everyday_commands_are_short(code: int) -> None:
    assert code.to_bytes(4, "big") not in long_commands(tpm2=True)


def test_command_code_of_a_stump() -> None:
    assert command_code(bytes.fromhex("80010000000a0000")) == b"\0\0"
    assert command_code(b"") == b""
