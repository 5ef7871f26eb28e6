"""A guest with Debian's kernel uses the TPM that QEMU shows it."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final

import pytest

from tests.qemu.facts import DEBUG_PCR, extend, read_pcrs
from tests.qemu.fleet import ARM2, ARM_UEFI2, CRB2, SPAPR2, TIS2, UEFI2
from tests.support import commands

if TYPE_CHECKING:
    from tests.qemu.fleet import Booted

# Where and how the kernel has found the TPM.
NAMES: Final = {
    **dict.fromkeys((CRB2, TIS2, UEFI2, ARM_UEFI2), "acpi:MSFT0101:"),
    ARM2: "of:Ntpm_tisT(null)Ctcg,tpm-tis-mmio",
    SPAPR2: "vio:TIBM,vtpmSIBM,vtpm20",
}


def banks(booted: Booted) -> tuple[str, ...]:
    return ("sha1", "sha256", "sha384", "sha512") if booted.kind.tpm2 else ("sha1",)


def test_devices_and_version(booted: Booted) -> None:
    shell = booted.machine.shell
    shell.run("test -c /dev/tpm0")
    shell.run(f"test {'' if booted.kind.tpm2 else '!'} -c /dev/tpmrm0")
    version = shell.run("cat /sys/class/tpm/tpm0/tpm_version_major")
    assert version == ("2\n" if booted.kind.tpm2 else "1\n")


@pytest.mark.parametrize("booted", NAMES, indirect=True, ids=str)
def test_the_firmware_names_it(booted: Booted) -> None:
    """Or QEMU itself, in the device tree of a machine without one."""
    name = booted.machine.shell.run("cat /sys/class/tpm/tpm0/device/modalias")
    assert name == f"{NAMES[booted.kind]}\n"


def test_every_pcr_in_sysfs(booted: Booted) -> None:
    expected = {f"{bank}/{number}" for bank in banks(booted) for number in range(24)}
    assert booted.pcrs.keys() == expected
    for name, value in booted.pcrs.items():
        assert len(bytes.fromhex(value)) == hashlib.new(name.split("/")[0]).digest_size


def test_random_bytes_from_the_kernel(booted: Booted) -> None:
    shell = booted.machine.shell
    current = shell.run("cat /sys/class/misc/hw_random/rng_current")
    if booted.kind.board.architecture == "arm64":
        assert current == "none\n", "the flavour of this kernel asks no TPM"
        return
    assert current == "tpm-rng-0\n"
    draws = [shell.run("dd if=/dev/hwrng bs=16 count=1 2>/dev/null | xxd -p") for _ in range(2)]
    assert all(len(bytes.fromhex(draw)) == 16 for draw in draws)
    assert draws[0] != draws[1]


def test_random_bytes_from_the_device(booted: Booted) -> None:
    tpm2 = booted.kind.tpm2
    command = commands.get_random(16) if tpm2 else commands.tpm12(0x46, bytes([0, 0, 0, 16]))
    devices = ["/dev/tpm0", "/dev/tpmrm0"] if tpm2 else ["/dev/tpm0"]
    for device in devices:
        answers = booted.machine.shell.tpm(command, command, device=device)
        assert [commands.code_of(answer) for answer in answers] == [0, 0]
        assert answers[0][-16:] != answers[1][-16:]


def test_extend_a_pcr(booted: Booted) -> None:
    shell, tpm2 = booted.machine.shell, booted.kind.tpm2
    bank = "sha256" if tpm2 else "sha1"
    name = f"{bank}/{DEBUG_PCR}"
    before = read_pcrs(shell)
    extend(shell, 0x11, tpm2=tpm2)
    after = read_pcrs(shell)
    digest = hashlib.new(bank).digest_size * b"\x11"
    expected = hashlib.new(bank, bytes.fromhex(before[name]) + digest).hexdigest()
    assert after.pop(name).lower() == expected
    before.pop(name)
    assert after == before
    read = commands.pcr_read(DEBUG_PCR) if tpm2 else commands.tpm12_pcr_read(DEBUG_PCR)
    (answer,) = shell.tpm(read)
    assert answer.hex().endswith(expected)
